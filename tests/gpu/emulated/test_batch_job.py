"""The batch job on emulated CUDA: `launch/infer.py` on two ranks writes the CPU's records.

Run: pytest tests/gpu/emulated/test_batch_job.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE
from tests.gpu.emulated.guard import obstacle
from tests.helpers.batch_case import command, infer, make_batch_job, records
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")


def infer_on_a_gpu(rank: int, guard: Path, argv: list[str]) -> tuple[int, str, int]:
    """Run infer.py on an emulated GPU; return its exit code, errors and number of kernels."""
    os.environ["LOCKSTEP_NATIVE"] = "0"
    with emulated_cuda(guard):
        code, _, err = infer(rank, argv)
        return code, err, sum(DEVICE.kernels.values())


def infer_on_the_cpu(rank: int, argv: list[str]) -> tuple[int, str]:
    os.environ["LOCKSTEP_NATIVE"] = "0"
    code, _, err = infer(rank, argv)
    return code, err


def split(record: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """Return what is equal on both devices, and the logprobs: which requests share a step depends
    on how fast the ranks are, and so does the rounding.
    """
    record = {**record, "timing": None}
    logprobs = [*(record.pop("logprobs", None) or []), *(record.pop("prompt_logprobs", None) or [])]
    return record, [each for each in logprobs if each is not None]


@pytest.mark.slow
def test_records_equal_the_cpus(guard: Path, tmp_path: Path) -> None:
    make_batch_job(tmp_path)
    cpu, gpu = tmp_path / "cpu.jsonl", tmp_path / "gpu.jsonl"
    for code, err in run_ranks(infer_on_the_cpu, 2, command(tmp_path, cpu)):
        assert code == 0, err
    argv = command(tmp_path, gpu, "--set", "runtime.device=cuda", "--set", "model.dtype=float32")
    for code, err, kernels in run_ranks(infer_on_a_gpu, 2, guard, argv, timeout=120):
        assert code == 0, err
        assert kernels > 0
    for found, expected in zip(records(gpu), records(cpu), strict=True):
        (found, logprobs), (expected, expected_logprobs) = split(found), split(expected)
        assert found == expected
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
