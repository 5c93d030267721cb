"""Soak: random faults, one after the other, hit a small greedy job; its output must not change.

    python tools/soak.py --faults 100 --seed 1     # about 20 minutes on two cores
    python tools/soak.py --faults 8 --ranks 2      # a minute: every kind once

Real processes on the CPU: torchrun with `--max-restarts` or without, 2 to 4 ranks that change from
start to start, the bundled model. Kind, victim and time of each fault are drawn from the seed; the
kinds are in tools/chaos/faults.py. In the end every request must have exactly one record, in input
order, equal to that of an undisturbed run, and no run may hang. As root the ranks run in a network
namespace and write to a tmpfs of their own, so that links and disks can be disturbed.

Prints a table, then one JSON line. Exit code 1 when a record was lost, doubled or differs, or when
something hung.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a checkout needs no install

from bench.environment_record import environment_record
from bench.report import emit, table
from chaos.faults import ENDS_AGENT, KINDS, faults
from chaos.job import Job, read_lines
from chaos.places import Network, is_root, network, small_disk, why_no_network
from chaos.records import Comparison, compare
from chaos.session import Outcome, Session

FINISH_S = 240.0  # limit of the last, undisturbed run


@dataclass(slots=True)
class Log:
    """Outcomes so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    jobs: list[tuple[Counter[str], Comparison]] = field(default_factory=list)  # kinds, records
    problems: list[str] = field(default_factory=list)  # hangs, and runs that failed by themselves
    num_runs: int = 0
    num_late: int = 0  # faults that were due after the job had ended

    @property
    def good(self) -> bool:
        """Whether nothing was lost, doubled, changed, or hung."""
        return not self.problems and all(found.same for _, found in self.jobs)


class Soak:
    """Injects faults into jobs, one after the other, until all are done and the last job ends."""

    def __init__(self, options: argparse.Namespace, folder: Path, net: Network | None) -> None:
        self.log = Log()
        self._options = options
        self._job = Job(folder, options.requests, options.timeout)
        self._rng = random.Random(options.seed)
        self._net = net
        self._disk = folder / "disk" if is_root() else None
        self._place = self._disk or folder
        self._kinds: Counter[str] = Counter()  # faults of the current job
        self._undisturbed = self._run_undisturbed(folder / "undisturbed.jsonl")

    def run(self) -> None:
        """Inject all faults, then let the job end."""
        options, log = self._options, self.log
        kinds = [kind for kind in options.kinds if kind != "slow_link" or self._net]
        sequence = faults(options.seed, kinds)
        fault = next(sequence)
        most = 3 * options.faults + 10
        while self._left and not log.problems:
            with self._session() as (session, max_restarts):
                hits: list[Outcome] = []
                while self._left and not session.ended and not log.problems:
                    outcome = session.hit(fault)
                    if self._note(outcome):
                        hits.append(outcome)
                        fault = next(sequence)
                self._end(session, hits, max_restarts)
            if log.num_runs > most:
                log.problems.append(f"{most} runs were not enough: the job makes no progress")
        if self._kinds and not log.problems:
            with self._session() as (session, max_restarts):
                self._end(session, [], max_restarts)

    @property
    def _left(self) -> bool:
        """Whether faults remain."""
        return len(self.log.outcomes) < self._options.faults

    @property
    def _output(self) -> Path:
        return self._place / f"job{len(self.log.jobs)}.jsonl"

    @contextlib.contextmanager
    def _session(self) -> Iterator[tuple[Session, int]]:
        options, rng = self._options, self._rng
        self.log.num_runs += 1
        num_ranks, max_restarts = rng.choice(options.ranks), rng.choice(options.restarts)
        with Session(
            self._job.command(self._output),
            self._output,
            num_ranks=num_ranks,
            max_restarts=max_restarts,
            bound_s=options.bound,
            network=self._net,
            disk=self._disk,
        ) as session:
            yield session, max_restarts

    def _note(self, outcome: Outcome) -> bool:
        """Record the outcome of a fault; return False when it was not injected."""
        kind = outcome.fault.kind
        if outcome.hang:
            self.log.problems.append(f"{kind}: {outcome.hang}")
        if not outcome.injected:
            self.log.num_late += 1
            return False
        self.log.outcomes.append(outcome)
        self._kinds[kind] += 1
        gone, back = outcome.gone_s, outcome.back_s
        message = "ranks continue" if gone is None else f"ranks ended after {gone:.1f} s"
        message += "" if back is None else f", next ones started after {back:.1f} s"
        number = f"{len(self.log.outcomes)}/{self._options.faults}"
        print(f"{number} {kind}, {outcome.num_ranks} ranks: {message}", file=sys.stderr, flush=True)
        return True

    def _end(self, session: Session, hits: list[Outcome], max_restarts: int) -> None:
        """Let a run end; if that completes the job, check the records and begin another."""
        log = self.log
        if log.problems:
            return
        code = session.finish(FINISH_S)
        if code == 0:
            found = compare(read_lines(self._output), self._undisturbed)
            log.jobs.append((self._kinds, found))
            self._kinds = Counter()
            print(f"job {len(log.jobs)} is complete: {found}", file=sys.stderr, flush=True)
            return
        provoked = any(hit.fault.kind in ENDS_AGENT for hit in hits) or len(hits) > max_restarts
        if code is None or not provoked:
            what = f"failed by itself, exit code {code}" if code else f"had not ended: {FINISH_S} s"
            log.problems.append(f"a run {what}; its log ends:\n{session.log[-4000:]}")

    def _run_undisturbed(self, output: Path) -> list[str]:
        command = [sys.executable, *self._job.command(output)]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=FINISH_S
        )
        if done.returncode:
            raise RuntimeError(f"the undisturbed run failed:\n{done.stderr}")
        return read_lines(output)


def rows_of(log: Log) -> list[dict[str, Any]]:
    """Return a row per kind: number of faults and jobs, durations, wrong records.

    A job with a wrong record counts for every kind of fault that it had.
    """
    rows = []
    for kind in KINDS:
        hits = [outcome for outcome in log.outcomes if outcome.fault.kind == kind]
        jobs = [found for kinds, found in log.jobs if kinds[kind]]
        gone = [hit.gone_s for hit in hits if hit.gone_s is not None]
        back = [hit.back_s for hit in hits if hit.back_s is not None]
        rows.append(
            {
                "kind": kind,
                "injected": len(hits),
                "jobs": len(jobs),
                "survived": sum(hit.gone_s is None and not hit.hang for hit in hits),
                "gone_s_median": round(statistics.median(gone), 2) if gone else None,
                "gone_s_max": round(max(gone), 2) if gone else None,
                "restart_s_max": round(max(back), 2) if back else None,
                "lost": sum(len(found.lost) for found in jobs),
                "doubled": sum(len(found.doubled) for found in jobs),
                "differing": sum(len(found.differing) + len(found.strange) for found in jobs),
                "hung": sum(bool(hit.hang) for hit in hits),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak; return the exit code."""
    options = _parse(argv)
    if why := why_no_network():
        print(f"slow_link is left out: {why}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lockstep-soak-") as name, network() as net:
        folder = Path(name)
        with small_disk(folder / "disk") if is_root() else contextlib.nullcontext():
            soak = Soak(options, folder, net)
            soak.run()
    log = soak.log
    rows = rows_of(log)
    columns = list(rows[0])
    text = table(columns, [[row[name] for name in columns] for row in rows])
    record = {
        "bench": "soak",
        "config": {name: getattr(options, name) for name in ("faults", "seed", *_KNOBS)},
        "faults": len(log.outcomes),
        "kinds": rows,
        "runs": log.num_runs,
        "jobs": len(log.jobs),
        "records": len(log.jobs) * options.requests,
        "lost": sum(len(found.lost) for _, found in log.jobs),
        "doubled": sum(len(found.doubled) for _, found in log.jobs),
        "differing": sum(len(found.differing) + len(found.strange) for _, found in log.jobs),
        "in_order": all(found.in_order for _, found in log.jobs),
        "problems": log.problems,
        "moments_missed": log.num_late,
        "seconds": round(time.monotonic() - began, 1),
    }
    emit(text, record | environment_record(("torch",)), options.out, "soak")
    for problem in log.problems:
        print(problem, file=sys.stderr)
    return 0 if log.good and not _left_undone(log, options) else 1


_KNOBS = ("requests", "ranks", "restarts", "timeout", "bound")


def _left_undone(log: Log, options: argparse.Namespace) -> bool:
    return len(log.outcomes) < options.faults


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Random faults against a small job.")
    parser.add_argument("--faults", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4], help="picked at random")
    parser.add_argument("--restarts", type=int, nargs="+", default=[0, 2, 4], help="as --ranks")
    parser.add_argument("--requests", type=int, default=400, help="of one job")
    parser.add_argument("--timeout", type=float, default=8.0, help="runtime.timeout_s of the ranks")
    parser.add_argument("--bound", type=float, default=40.0, help="seconds; beyond, a run hangs")
    parser.add_argument("--out", type=Path, help="a folder for table and JSON line")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
