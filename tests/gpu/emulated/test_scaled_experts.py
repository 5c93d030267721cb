"""Experts in FP8 with FP8 rows (`scaled_mm`) on emulated CUDA, beside the CPU's low-bit product.

Run: pytest tests/gpu/emulated/test_scaled_experts.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.moe.local_experts import LocalExperts
from engine.moe.low_bit_experts import LowBitExperts
from engine.ops.scaled_ffn import RowWeights
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DeviceError
from tests.gpu.emulated.guard import obstacle
from tests.gpu.emulated.runs import SCATTERED, Job, Placed, Result, run
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

SCALED = {"experts": {"backend": "scaled_mm"}}
FP8 = ((LowBitExperts, "__call__"),)
MODEL = {"dtype": "bfloat16"}
JOBS = {
    "made": Job("qwen3_moe", {"model": {**MODEL, "quantization": "fp8"}, "moe": SCALED}, uses=FP8),
    "as stored": Job("qwen3_moe fp8-channel", {"model": MODEL, "moe": SCALED}, uses=FP8),
    "as stored per tensor, chunks": Job(
        "qwen3_moe fp8-tensor",
        {"model": MODEL, "moe": {**SCALED, "overlap": {"chunks": 2}}},
        uses=FP8,
    ),
    "int4 copies": Job(
        "mixtral",
        {
            "model": {**MODEL, "quantization": "fp8"},
            "moe": {**SCALED, "copies": {"target": 1.0}},
        },
        uses=(*FP8, (LocalExperts, "_run_copies")),
        placement=Placed(SCATTERED, tuple(range(8)), precision="int4"),
    ),
    "copies as precise": Job(
        "mixtral",
        {"model": {**MODEL, "quantization": "fp8"}, "moe": SCALED},
        uses=FP8,
        placement=Placed(SCATTERED, tuple(range(8))),
    ),
}
LONG = JOBS.keys() - {"as stored", "int4 copies"}


def on_emulated(rank: int, guard: Path, path: Path, job: Job) -> tuple[Result, Result]:
    """Run a job on emulated CUDA, and on the CPU without rounded activations."""
    moe = {key: value for key, value in job.settings["moe"].items() if key != "experts"}
    model = {"quantization": "keep", **job.settings["model"]}
    plain = replace(job, settings={**job.settings, "model": model, "moe": moe}, uses=())
    return run(rank, guard, path, job), run(rank, None, path, plain)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in JOBS]
)
def test_first_tokens_are_about_as_likely_as_without_rounded_activations(name, guard, checkpoint):
    job = JOBS[name]
    results = run_ranks(on_emulated, 2, guard, checkpoint(job.family), job, timeout=120)
    for cuda, cpu in results:
        assert cuda.kernels > 0 == cpu.kernels and cuda.done
        for one, other in zip(cuda.done, cpu.done, strict=True):
            assert abs(one["logprobs"][0] - other["logprobs"][0]) < 0.1


def test_the_emulated_product_refuses_what_cuda_refuses(guard):
    run_ranks(refuses, 1, guard)


def refuses(rank: int, guard: Path) -> None:
    """Call the product with layouts that CUDA does not take."""
    with emulated_cuda(guard):
        rows = torch.zeros(4, 32, device="cuda").to(torch.float8_e4m3fn)
        weights = RowWeights(
            torch.zeros(2, 48, 32, device="cuda").to(torch.float8_e4m3fn),
            torch.ones(2, 48, device="cuda"),
        )
        scale, ends = torch.ones(4, device="cuda"), torch.tensor([1, 4], dtype=torch.int32)

        def product(codes_eKN: torch.Tensor, offs: torch.Tensor, dtype: torch.dtype) -> torch.Size:
            call = torch._scaled_grouped_mm
            made = call(rows, codes_eKN, scale, weights.scale_eO, offs=offs, out_dtype=dtype)
            return made.shape

        good = weights.codes_eOI.transpose(1, 2)
        on_device, narrow = ends.to("cuda"), torch.bfloat16
        assert product(good, on_device, narrow) == (4, 48)
        with pytest.raises(RuntimeError, match="column major"):
            product(good.contiguous(), on_device, narrow)
        with pytest.raises(RuntimeError, match="int32"):
            product(good, on_device.long(), narrow)
        with pytest.raises(RuntimeError, match="bfloat16"):
            product(good, on_device, torch.float16)
        with pytest.raises(DeviceError, match="CPU tensor"):
            product(good, ends, narrow)
