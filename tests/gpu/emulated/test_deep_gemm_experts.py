"""Experts in FP8 blocks by DeepGEMM's contract on emulated CUDA, beside the CPU's low-bit product.

Run: pytest tests/gpu/emulated/test_deep_gemm_experts.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.moe.local_experts import LocalExperts
from engine.moe.low_bit_experts import LowBitExperts
from engine.ops import block_scaled_ffn
from engine.ops.block_scaled_ffn import BLOCK, BlockWeights
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE, DeviceError
from tests.gpu.emulated.guard import obstacle
from tests.gpu.emulated.runs import SCATTERED, Job, Placed, Result, run
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

LIBRARY = {"experts": {"backend": "deep_gemm"}}
USES = ((LowBitExperts, "__call__"),)
MODEL = {"dtype": "bfloat16"}
STORED = "qwen3_moe-128 fp8-128"
JOBS = {
    "as stored": Job(STORED, {"model": MODEL, "moe": LIBRARY}, uses=USES),
    "by auto": Job(STORED, {"model": MODEL, "moe": {}}, uses=USES),
    "made, chunks": Job(
        "qwen3_moe-128",
        {
            "model": {**MODEL, "quantization": "fp8"},
            "moe": {**LIBRARY, "overlap": {"chunks": 2}},
        },
        uses=USES,
    ),
    "copies as precise": Job(
        STORED,
        {"model": MODEL, "moe": LIBRARY},
        uses=USES,
        placement=Placed(SCATTERED, tuple(range(8))),
    ),
    "int4 copies": Job(
        STORED,
        {"model": MODEL, "moe": {**LIBRARY, "copies": {"target": 1.0}}},
        uses=(*USES, (LocalExperts, "_run_copies")),
        placement=Placed(SCATTERED, tuple(range(8)), precision="int4"),
    ),
}
LONG = JOBS.keys() - {"as stored"}


def on_emulated(rank: int, guard: Path, path: Path, job: Job) -> tuple[Result, Result, int]:
    """Run a job on emulated CUDA, and on the CPU without rounded activations."""
    moe = {key: value for key, value in job.settings["moe"].items() if key != "experts"}
    model = {"quantization": "keep", **job.settings["model"]}
    plain = replace(job, settings={**job.settings, "model": model, "moe": moe}, uses=())
    cuda = run(rank, guard, path, job)
    products = sum(count for name, count in DEVICE.kernels.items() if name.startswith("deep_gemm"))
    return cuda, run(rank, None, path, plain), products


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in JOBS]
)
def test_first_tokens_are_about_as_likely_as_without_rounded_activations(name, guard, checkpoint):
    job = JOBS[name]
    results = run_ranks(on_emulated, 2, guard, checkpoint(job.family), job, timeout=120)
    for cuda, cpu, products in results:
        assert cuda.kernels > 0 == cpu.kernels and cuda.done
        assert products > 0 and products % 2 == 0
        for one, other in zip(cuda.done, cpu.done, strict=True):
            assert abs(one["logprobs"][0] - other["logprobs"][0]) < 0.1


def test_a_layer_is_six_launches_and_a_copy_in_both_layouts(guard):
    run_ranks(launches, 1, guard)


def launches(rank: int, guard: Path) -> None:
    """Run the FFN on few and many rows, which the host does not wait for."""
    with emulated_cuda(guard):
        w13, w2 = (
            BlockWeights(
                torch.zeros(2, outputs, inputs, device="cuda").to(torch.float8_e4m3fn),
                torch.ones(2, outputs // BLOCK, inputs // BLOCK, device="cuda"),
            )
            for outputs, inputs in ((256, 128), (128, 128))
        )
        for counts, product in (([3, 0], "masked"), ([0, 200], "contiguous")):
            rows = torch.zeros(sum(counts), 128, dtype=torch.bfloat16, device="cuda")
            index = torch.arange(sum(counts), device="cuda")
            DEVICE.reset_counts()
            block_scaled_ffn.block_scaled_ffn(rows, w13, w2, counts, torch.empty_like(rows), index)
            assert sum(DEVICE.kernels.values()) == 7, DEVICE.kernels
            assert DEVICE.kernels[f"deep_gemm m_grouped_fp8_gemm_nt_{product}"] == 2
            assert not DEVICE.syncs
        counts_e = torch.tensor([3, 0], dtype=torch.int32)  # on the host
        placed = torch.zeros(256, 128, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
        scale, owner = (
            torch.ones(2, 1, 128, device="cuda"),
            torch.zeros(256, dtype=torch.int32, device="cuda"),
        )
        with pytest.raises(DeviceError, match="CPU tensor"):
            block_scaled_ffn.block_product((placed, scale), w13, counts_e, owner, 2, torch.bfloat16)
