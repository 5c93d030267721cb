"""Big input: cost of a million lines in memory and time, and whether ranks run out of work.

    python tools/bench_big_input.py                  # two ranks, the bundled model, about 3 minutes
    python tools/bench_big_input.py --lines 100000

Real runs of launch/infer.py on the CPU, of inputs whose lines are nearly all done, so that only the
bookkeeping is big:

    few      32 requests and nothing else: the cost of an empty job
    resumed  the same 32, behind a ledger that holds all other lines' records; then all are merged
    fresh    nothing is done: up to the first record, then SIGTERM

Peak MiB is rank 0's (VmHWM). `scan` is timed in this process, as rank 0 does it: the input, then
the ledger; the median of 3. Idle is the share of the ranks' steps without a token, up to the step
that starts the last request, over a job with requests of 1 to 60 new tokens. The table is followed
by one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.candidate import REPOSITORY, WorkerError
from bench.environment_record import environment_record
from bench.parts import written
from bench.report import emit, table

HEADER = ["job", "lines", "seconds", "to first record s", "rank 0 peak MiB", "over few MiB"]
_FEW = 32
_SCRIPT = REPOSITORY / "launch" / "infer.py"
_CONFIG = "tiny_mixtral_ep2"
_WORDS = "the of value return def sum class model when input over each".split()


@dataclass(slots=True)
class Run:
    """One run of the job."""

    seconds: float
    first_s: float | None  # to the first record in the ledger
    peak_mib: float


def make_input(path: Path, lines: int, words: tuple[int, int], new_tokens: tuple[int, int]) -> None:
    """Write requests with random numbers of words and new tokens in these ranges."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(lines):
            prompt = " ".join(draw.choices(_WORDS, k=draw.randint(*words)))
            limit = draw.randint(*new_tokens)
            line = {"id": f"request-{number}", "prompt": prompt, "max_new_tokens": limit}
            file.write(json.dumps(line) + "\n")


def fill_ledger(source: Path, output: Path, left: int) -> None:
    """Put a record into the ledger for every line but the last `left`, out of order, as runs do."""
    from engine.batch.input.index import scan_input
    from engine.batch.job_identity import make_manifest
    from engine.batch.ledger import Ledger, encode, shard_path
    from engine.config.loader import load_config
    from engine.request import Completion

    index = scan_input(source)
    ledger = Ledger(output)
    ledger.start_over(make_manifest(index, load_config(_CONFIG, _settings(None))))
    numbers = list(range(len(index) - left))
    random.Random(1).shuffle(numbers)
    with shard_path(ledger.directory, 0).open("wb") as part:
        for number in numbers:
            tokens = list(range(100, 116))
            part.write(
                encode(Completion(number, f"request-{number}", "x " * 32, tokens, "length", 20, 16))
            )
    ledger.close()


def scan_seconds(source: Path, output: Path) -> tuple[float, float]:
    """Return seconds to index the input and to read the ledger, as rank 0 does before it runs."""
    from engine.batch.input.index import scan_input
    from engine.batch.input.pending import PendingLines
    from engine.batch.ledger import Ledger

    taken: list[tuple[float, float]] = []
    for _ in range(3):
        begin = time.perf_counter()
        index = scan_input(source)
        scanned = time.perf_counter()
        ledger = Ledger(output)
        ledger.create_shards(2)
        PendingLines.select(index, ledger.done(len(index)))
        taken.append((scanned - begin, time.perf_counter() - scanned))
        ledger.close()
    return tuple(statistics.median(each) for each in zip(*taken, strict=True))


def run_job(
    source: Path, output: Path, ranks: int, spans: Path | None = None, until_first: bool = False
) -> Run:
    """Run the job on `ranks` processes. until_first: end it by SIGTERM at its first record."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    overrides = [word for setting in _settings(spans) for word in ("--set", setting)]
    command = [sys.executable, str(_SCRIPT), "--config", _CONFIG, *overrides]
    command += ["--input", str(source), "--output", str(output)]
    environ = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    before = written(output)
    begin = time.perf_counter()
    running = [
        subprocess.Popen(
            command,
            env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    first_s, peak_mib = None, 0.0
    try:
        while running[0].poll() is None:
            peak_mib = max(peak_mib, _peak_mib(running[0].pid))
            if first_s is None and written(output) > before:
                first_s = time.perf_counter() - begin
                if until_first:
                    for process in running:
                        process.send_signal(signal.SIGTERM)
            time.sleep(0.01)
        seconds = time.perf_counter() - begin
        expected = 128 + signal.SIGTERM if until_first else 0
        for process in running:
            _, errors = process.communicate(timeout=60)
            if process.returncode != expected:
                raise WorkerError(f"exit code {process.returncode}:\n{errors[-2000:]}")
    finally:
        for process in running:
            process.kill()
            process.wait()
    return Run(seconds, first_s, peak_mib)


def idle_share(folder: Path) -> tuple[float, list[int]]:
    """Return the share of steps without a token until the last request starts; each rank's
    tokens up to there.
    """
    from engine.profiling.phase_clock import Phase

    tokens_of: dict[int, list[int]] = {}
    last = 0
    for path in sorted(folder.glob("*.jsonl")):
        header, *steps = map(json.loads, path.read_text().splitlines())
        gate = header["phases"].index(Phase.GATE.name.lower())
        own = tokens_of[header["rank"]] = []
        for step in steps:
            own.append(sum(span[4] for span in step["spans"] if span[0] == gate and span[1] == 0))
            if step["prefill"]:
                last = max(last, len(own))
    begun = {rank: own[:last] for rank, own in tokens_of.items()}
    idle = sum(own.count(0) for own in begun.values())
    return idle / (last * len(begun)), [sum(begun[rank]) for rank in sorted(begun)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all jobs; print the table and the JSON line."""
    options = _parse(argv)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        few, big, ragged = (folder / f"{kind}.jsonl" for kind in ("few", "big", "ragged"))
        make_input(few, _FEW, (3, 40), (16, 16))
        make_input(big, options.lines, (3, 40), (16, 16))
        make_input(ragged, options.ragged, (3, 60), (1, 60))
        runs = {"few": run_job(few, folder / "few.out", options.ranks)}
        runs["fresh"] = run_job(big, folder / "fresh.out", options.ranks, until_first=True)
        fill_ledger(big, folder / "big.out", _FEW)
        input_s, ledger_s = scan_seconds(big, folder / "big.out")
        runs["resumed"] = run_job(big, folder / "big.out", options.ranks)
        with (folder / "big.out").open("rb") as file:
            merged = sum(1 for _ in file)
        if merged != options.lines:
            raise WorkerError(f"{merged} records of {options.lines}")
        run_job(ragged, folder / "ragged.out", options.ranks, folder / "spans")
        idle, tokens = idle_share(folder / "spans")
        size = big.stat().st_size
    base = runs["few"].peak_mib
    rows = [
        [
            kind,
            f"{_FEW if kind == 'few' else options.lines:,}",
            run.seconds,
            run.first_s,
            run.peak_mib,
            run.peak_mib - base,
        ]
        for kind, run in runs.items()
    ]
    text = (
        f"{options.lines:,} lines, {size / 1e6:.0f} MB, {options.ranks} ranks\n"
        f"{table(HEADER, rows)}\n\n"
        f"scan: input {input_s:.2f} s + ledger {ledger_s:.2f} s = {input_s + ledger_s:.2f} s\n"
        f"idle: {idle:.2%} of the steps of {options.ragged} ragged requests; "
        f"tokens by rank {tokens}"
    )
    record = {
        "bench": "big_input",
        **environment_record(("torch",)),
        "options": {key: value for key, value in vars(options).items() if key != "out"},
        "input_bytes": size,
        "scan_s": {"input": input_s, "ledger": ledger_s},
        "idle": idle,
        "tokens_by_rank": tokens,
        "jobs": {
            kind: {"seconds": run.seconds, "first_s": run.first_s, "peak_mib": run.peak_mib}
            for kind, run in runs.items()
        },
    }
    emit(text, record, options.out, "bench_big_input")
    return 0


def _settings(spans: Path | None) -> list[str]:
    settings = ["runtime.device=cpu", "runtime.drain_s=0", "scheduler.max_sequences=16"]
    settings += ["sampling.ignore_eos=true"]
    return settings + ([f"profiler.spans={spans}"] if spans else [])


def _peak_mib(pid: int) -> float:
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--ragged", type=int, default=600, help="requests of the job for idle")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for bench_big_input.txt and .json")
    options = parser.parse_args(argv)
    if options.lines < 2 * _FEW or options.ragged < 1 or options.ranks < 1:
        parser.error(f"--lines must be at least {2 * _FEW}, --ragged and --ranks at least 1")
    return options


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    try:
        sys.exit(main())
    except (ValueError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
