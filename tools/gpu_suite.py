"""GPU suite: all checks that need a GPU, in one command; prints a table and one JSON line.

    python tools/gpu_suite.py --only nccl,speed --out DIR     # at most 4 minutes
    python tools/gpu_suite.py --out DIR                       # the rest; at most 10 minutes in all

    nccl       torchrun over all GPUs: tokens of EP N against 1, zero rows, chunks, TP 2; a rank
               killed, a rank stopped: the report within the limit and no process left
    speed      decode steps and prefill at real widths against bandwidth and FLOPs; launches and
               syncs against their budgets; grouped_mm against te; a layer on 8 virtual ranks
    step       a whole step: the host waits only where the source says so
    experts    backends torch, grouped_mm, te against float64, float32 and bfloat16, skewed loads;
               scaled_mm and deep_gemm against their plain forms
    pipeline   dispatch, experts and combine in 1 to 3 chunks: equal, and no host sync in between
    capacity   every policy's decisions, device against CPU: identical
    kernels    every op on the device (Triton) against its plain torch reference
    attention  head sizes 64 to 256 and latent 576/512, contexts to 32k: values and bandwidth
    engine     greedy tokens and log probabilities of every family, CUDA against CPU; the batch job
               under torchrun with one rank over NCCL; peak memory against its budget
    memory     a KV cache that the engine sizes; rate of loading weights
    clocks     the profiler's device clock against the host's, over a minute
    graphs     decode steps as CUDA graphs: tokens of eager ones, and the time of both (at most two
               minutes more; only by --only graphs)

Every part is a process with a time limit, which is printed: one that exceeds it is stopped and
reported, and the others go on. Its results are in gpu_suite_DEVICE.json of the folder as soon as it
ends. Parts that ended with this commit on this machine are not run again without --again.

Checkpoints are small, random and made on the fly; no network. Without CUDA it stops with exit code
2, or with --allow-cpu runs the same parts on the CPU, with small shapes. Exit code 1: a check
failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no install

from bench.environment_record import REPOSITORY, environment_record
from bench.report import cell, table
from gpu_checks.check import Check, Settings
from gpu_checks.parts import DEFAULT, LIMIT_S, PARTS
from gpu_checks.worker import run_part
from make_random_checkpoint import FAMILIES

PACKAGES = ("torch", "transformers", "triton", "transformer_engine", "nvidia-nccl-cu12")
PACKAGES += ("nvidia-nccl-cu13", "deep_gemm")
# Sources that decide the results; a copy of them need not be a git checkout.
_SOURCES = ("engine", "kernels", "launch", "tools/gpu_checks", "tools/bench")


def run_parts(
    names: Sequence[str],
    settings: Settings,
    environment: Mapping[str, Any],
    out: Path | None,
    again: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run parts one after the other; return the record of each that is known, by name.

    Args:
        names: the parts to run.
        environment: the commit and the machine; a part that ended with the same is not run again.
        out: folder with the records of earlier runs, and for the new ones.
        again: run parts that have ended too.
    """
    file = None if out is None else _file(out, settings)
    records: dict[str, dict[str, Any]] = {}
    if file is not None and file.exists():
        records = json.loads(file.read_text(encoding="utf-8"))["parts"]
    # Limits are those of a GPU; small shapes try the suite on any machine, however busy.
    slack = 10 if settings.is_tiny else 1
    deadline = time.monotonic() + LIMIT_S * slack
    for name in (name for name in PARTS if name in names):
        known = records.get(name)
        if not again and known and known["is_whole"] and known["environment"] == environment:
            print(f"{name}: done before, {known['seconds']:.0f} s", file=sys.stderr)
            continue
        limit_s = min(PARTS[name].seconds * slack, deadline - time.monotonic())
        if limit_s < 5:
            print(f"{name}: not begun, no time is left; run the command again", file=sys.stderr)
            continue
        print(f"{name}: at most {limit_s:.0f} s", file=sys.stderr, flush=True)
        outcome = run_part(name, settings, limit_s, None if out is None else _log(out, name))
        failed = sum(check.passed is False for check in outcome.checks)
        text = f"{name}: {outcome.seconds:.0f} s, {len(outcome.checks)} checks, {failed} failed"
        print(text, file=sys.stderr, flush=True)
        records[name] = {
            "environment": dict(environment),
            "seconds": outcome.seconds,
            "limit_seconds": limit_s,
            "is_whole": outcome.is_whole,
            "checks": [check.plain() for check in outcome.checks],
        }
        if file is not None:
            _write(file, json.dumps(_record(records, settings, environment)))
    return records


def summary(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of all parts, and lines of times and counts under it."""
    rows: list[list[object]] = []
    counts: Counter[str] = Counter()
    for part, record in records.items():
        for check in (Check(**fields) for fields in record["checks"]):
            counts[check.result] += 1
            note = check.note[:70]
            rows.append([part, check.name, check.result, check.value, check.bound, note])
    header = ["part", "check", "result", "value", "bound", "note"]
    times = ", ".join(
        f"{part} {cell(record['seconds'])} of {cell(record['limit_seconds'])}"
        for part, record in records.items()
    )
    total = ", ".join(f"{counts[each]} {each}" for each in ("ok", "FAILED", "not here", "figure"))
    return f"{table(header, rows, left=(0, 1, 2, 5))}\n\nseconds: {times}\n{total}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; return the exit code."""
    options = _parse(argv)
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not options.allow_cpu:
        print(
            "error: no CUDA device here; run this on a machine with one, or pass --allow-cpu to "
            "try the same checks on the CPU",
            file=sys.stderr,
        )
        return 2
    settings = Settings(
        device=torch.device("cuda" if has_gpu else "cpu"),
        families=tuple(options.families),
        is_tiny=options.tiny or not has_gpu,
    )
    environment = {**_environment(), "families": list(settings.families), "tiny": settings.is_tiny}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    records = run_parts(options.only, settings, environment, options.out, options.again)
    # Of another commit or machine: they stay in the file, and are not mixed with these.
    records = {name: each for name, each in records.items() if each["environment"] == environment}
    text = summary(records)
    print(f"{text}\n\n{json.dumps(_record(records, settings, environment), allow_nan=False)}")
    if options.out is not None:
        _write(_file(options.out, settings).with_suffix(".txt"), text)
        folder = "docs/results/gpu"
        files = " ".join(shlex.quote(str(_file(options.out, settings, end))) for end in _ENDS)
        print(f"\nto commit: cp {files} {folder}/ && git add {folder}", file=sys.stderr)
    ran = [check for record in records.values() for check in record["checks"]]
    return 1 if any(check["passed"] is False for check in ran) else 0


_ENDS = (".json", ".txt")


def _environment() -> dict[str, Any]:
    """Return what a result depends on: commit, sources, hardware and versions."""
    found = hashlib.sha256()
    for root in _SOURCES:
        for path in sorted((REPOSITORY / root).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h") and path.is_file():
                found.update(path.read_bytes())
    record = environment_record(PACKAGES)
    count = torch.cuda.device_count()
    return {**record, "sources": found.hexdigest()[:12], "cuda": torch.version.cuda, "gpus": count}


def _record(
    records: Mapping[str, Any], settings: Settings, environment: Mapping[str, Any]
) -> dict[str, Any]:
    device = settings.device.type
    return {"suite": "gpu", "device": device, **environment, "parts": dict(records)}


def _file(out: Path, settings: Settings, end: str = ".json") -> Path:
    return out / f"gpu_suite_{settings.device.type}{end}"


def _log(out: Path, name: str) -> Path:
    folder = out / "logs"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.log"
    path.unlink(missing_ok=True)
    return path


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all: the machine may be taken away at any moment."""
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=_some_of(tuple(PARTS)), default=DEFAULT, metavar="A,B")
    parser.add_argument("--families", type=_some_of(FAMILIES), default=FAMILIES, metavar="A,B")
    parser.add_argument("--allow-cpu", action="store_true", help="run on the CPU without CUDA")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the suite")
    parser.add_argument("--again", action="store_true", help="run parts that are done, too")
    parser.add_argument("--out", type=Path, help="folder for gpu_suite_DEVICE.txt and .json")
    return parser.parse_args(argv)


def _some_of(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)} is not known; choose from {', '.join(known)}"
            )
        return names

    return parse


if __name__ == "__main__":
    # As an exception, so that a part that runs ends with all that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
