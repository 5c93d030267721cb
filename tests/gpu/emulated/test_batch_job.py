"""The batch job on emulated CUDA: `launch/infer.py` on two ranks writes the CPU's records.

Run: pytest tests/gpu/emulated/test_batch_job.py
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.distributed.health.watchdog import Watchdog
from engine.generation import builder
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE
from tests.gpu.emulated.guard import obstacle
from tests.helpers.batch_case import command, infer, make_batch_job, records
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")


def infer_on_a_gpu(rank: int, guard: Path, argv: list[str]) -> tuple[int, str, int, list[str]]:
    """Run infer.py on an emulated GPU; return its exit code, errors, number of kernels, and what it
    did in which order: "import NAME", "watch HANDLING".
    """
    os.environ["LOCKSTEP_NATIVE"] = "0"
    order: list[str] = []
    watch = Watchdog.__enter__

    def enter(self: Watchdog) -> Watchdog:
        order.append(f"watch {os.environ['TORCH_NCCL_ASYNC_ERROR_HANDLING']}")
        return watch(self)

    with pytest.MonkeyPatch.context() as patch, emulated_cuda(guard):
        patch.setattr(Watchdog, "__enter__", enter)
        library = SimpleNamespace(import_module=lambda name: order.append(f"import {name}"))
        patch.setattr(builder, "importlib", library)
        code, _, err = infer(rank, argv)
        return code, err, sum(DEVICE.kernels.values()), order


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
    for code, err, kernels, order in run_ranks(infer_on_a_gpu, 2, guard, argv, timeout=120):
        assert code == 0, err
        assert kernels > 0
        # Libraries that take long to import are there before heartbeats count.
        libraries = ["triton", "transformer_engine.pytorch", "deep_gemm"]
        assert order == [*(f"import {library}" for library in libraries), "watch 0"]
    for found, expected in zip(records(gpu), records(cpu), strict=True):
        (found, logprobs), (expected, expected_logprobs) = split(found), split(expected)
        assert found == expected
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
