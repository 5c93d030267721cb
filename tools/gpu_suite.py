"""GPU suite: all checks that need a GPU, in one command; prints a table and one JSON line.

    python tools/gpu_suite.py --out docs/gpu
    PYTHONPATH=/path/to/transformer_engine python tools/gpu_suite.py --only experts,kernels

    experts    backends torch, grouped_mm, te against float64, float32 and bfloat16, skewed loads
    pipeline   dispatch, experts and combine in 1 to 3 chunks: equal, and no host sync in between
    capacity   every policy's decisions, device against CPU: identical
    kernels    every op on the device (Triton) against its plain torch reference
    engine     greedy tokens and log probabilities of every family, CUDA against CPU; the batch job
               under torchrun with one rank over NCCL; peak memory against its budget

Checkpoints are small, random and made on the fly; no network. Without CUDA it stops with exit code
2, or with --allow-cpu runs the same checks on the CPU. Exit code 1: a check failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no install

from bench.environment_record import environment_record
from bench.report import emit, table
from gpu_checks.capacity import check_capacity
from gpu_checks.check import Check, guarded
from gpu_checks.engine import check_engine
from gpu_checks.experts import check_experts
from gpu_checks.kernels import check_kernels
from gpu_checks.pipeline import check_pipeline
from make_random_checkpoint import FAMILIES

SUBJECTS = ("experts", "pipeline", "capacity", "kernels", "engine")
PACKAGES = ("torch", "transformers", "triton", "transformer_engine", "nvidia-nccl-cu12")
PACKAGES += ("nvidia-nccl-cu13",)


def run_checks(device: str, only: Sequence[str], families: Sequence[str]) -> list[Check]:
    """Run the chosen subjects on 'cuda' or 'cpu'."""
    found: list[Check] = []
    where = torch.device(device)
    if "experts" in only:
        found += check_experts(where)
    if "pipeline" in only:
        found += check_pipeline(where)
    if "capacity" in only:
        found += check_capacity(where)
    if "kernels" in only:
        found += check_kernels(where)
    if "engine" in only:
        with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder:
            found += guarded(
                "engine", "start", lambda: check_engine(device, Path(folder), families)
            )
    return found


def summary(checks: Sequence[Check]) -> str:
    """Return the table, and one line of counts under it."""
    results = {True: "ok", False: "FAILED", None: "not here"}
    rows = [[c.group, c.name, results[c.passed], c.value, c.bound, c.note[:60]] for c in checks]
    counts = Counter(results[c.passed] for c in checks)
    total = ", ".join(f"{counts[result]} {result}" for result in results.values())
    header = ["group", "check", "result", "value", "bound", "note"]
    return f"{table(header, rows, left=(0, 1, 2, 5))}\n\n{total}"


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
    device = "cuda" if has_gpu else "cpu"
    began = time.monotonic()
    checks = run_checks(device, options.only, options.families)
    record: dict[str, Any] = {
        "suite": "gpu",
        "device": device,
        **environment_record(PACKAGES),
        "cuda": torch.version.cuda,
        "seconds": time.monotonic() - began,
        "checks": [_plain(check) for check in checks],
    }
    emit(summary(checks), record, options.out, f"gpu_suite_{device}")
    return 1 if any(check.passed is False for check in checks) else 0


def _plain(check: Check) -> dict[str, Any]:
    plain = asdict(check)
    if check.value is not None and check.value in (float("inf"), float("-inf")):
        plain["value"] = None  # JSON has no infinity; note and result stay
    return plain


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=_some_of(SUBJECTS), default=SUBJECTS, metavar="A,B")
    parser.add_argument("--families", type=_some_of(FAMILIES), default=FAMILIES, metavar="A,B")
    parser.add_argument("--allow-cpu", action="store_true", help="run on the CPU without CUDA")
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
    sys.exit(main())
