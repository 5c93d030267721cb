"""Experts in few bits on emulated CUDA: the CPU's completions, with homes, copies and other forms.

Run: pytest tests/gpu/emulated/test_low_bit_experts.py
"""

from __future__ import annotations

import pytest

from engine.moe.local_experts import LocalExperts
from engine.moe.low_bit_experts import LowBitExperts
from tests.gpu.emulated.guard import obstacle
from tests.gpu.emulated.runs import SCATTERED, Job, Placed

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

HOMES = ((LowBitExperts, "__call__"),)
COPIES = (*HOMES, (LocalExperts, "_run_copies"))
ALL = tuple(range(8))  # experts that both ranks have
COPIED = {"copies": {"target": 1.0}}
JOBS = {
    "int4": Job("mixtral", {"model": {"quantization": "int4"}}, uses=HOMES),
    "fp8": Job("mixtral", {"model": {"quantization": "fp8"}}, uses=HOMES),
    "fp8 as stored": Job("qwen3_moe fp8-block", {"model": {"quantization": "keep"}}, uses=HOMES),
    "mxfp4 as stored": Job("gpt_oss mxfp4", {"model": {"quantization": "keep"}}, uses=HOMES),
    "fp8, copies as precise": Job(
        "mixtral",
        {"model": {"quantization": "fp8"}, "moe": COPIED},
        uses=HOMES,
        placement=Placed(SCATTERED, ALL),
    ),
    "fp8, int4 copies": Job(
        "mixtral",
        {"model": {"quantization": "fp8"}, "moe": COPIED},
        uses=COPIES,
        placement=Placed(SCATTERED, ALL, precision="int4"),
    ),
    "fp8 as stored, int4 copies": Job(
        "qwen3_moe fp8-channel",
        {"model": {"quantization": "keep"}, "moe": COPIED},
        uses=COPIES,
        placement=Placed(SCATTERED, ALL, precision="int4"),
    ),
    "bfloat16 mxfp4 as stored": Job(
        "gpt_oss mxfp4", {"model": {"quantization": "keep", "dtype": "bfloat16"}}, uses=HOMES
    ),
}
# What others cover in parts runs in `make test-long`.
LONG = JOBS.keys() - {"fp8 as stored", "mxfp4 as stored", "fp8, int4 copies"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in JOBS]
)
def test_completions_equal_the_cpus_to_the_bit(name: str, on_both_devices) -> None:
    for cpu, cuda in on_both_devices(JOBS[name]):
        assert cuda.dispatched == cpu.dispatched > 0


@pytest.mark.long
def test_auto_keeps_on_cuda_what_it_dequantises_on_the_cpu(on_both_devices) -> None:
    job = Job("qwen3_moe fp8-block", {"model": {"quantization": "auto", "dtype": "bfloat16"}})
    kept = Job(job.family, {"model": {"quantization": "keep", "dtype": "bfloat16"}})
    for (_, auto), (_, keep) in zip(on_both_devices(job), on_both_devices(kept), strict=True):
        assert auto.done == keep.done and auto.kernels == keep.kernels
