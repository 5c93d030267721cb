"""The link measured on emulated CUDA, and the launches that its thresholds count.

Run: pytest tests/gpu/emulated/test_link.py
"""

from __future__ import annotations

from pathlib import Path

from engine.config import Config, ModelConfig, RuntimeConfig
from engine.distributed import bootstrap
from engine.distributed.groups import Link
from engine.distributed.link import measure_link
from engine.moe.dispatch.layout_policy import CHUNK_LAUNCHES, DEDUP_LAUNCHES
from tests.gpu.emulated.cuda import emulated_cuda
from tests.helpers.ranks import run_ranks
from tools.gpu_checks.launches import COLUMNS, read_table


def measured(rank: int, guard: Path) -> Link | None:
    runtime = RuntimeConfig(device="cuda", timeout_s=60.0)
    with emulated_cuda(guard):
        topology = bootstrap.start(Config(model=ModelConfig(path="unused"), runtime=runtime))
        link = measure_link(topology.expert, topology.control, topology.device)
        bootstrap.stop(topology)
    return link


def test_all_ranks_measure_the_same_link(guard):
    one, other = run_ranks(measured, 2, guard)
    assert one == other and min(one.latency_s, one.bytes_per_s, one.launch_s) > 0


def test_thresholds_count_the_launches_of_the_table():
    _, rows = read_table()
    kernels = {name: numbers[COLUMNS.index("kernels")] for name, numbers in rows.items()}
    usual = kernels["qwen3_moe decode"]
    assert kernels["qwen3_moe decode, deduplicated"] - usual == DEDUP_LAUNCHES
    assert kernels["qwen3_moe decode, two chunks"] - usual == CHUNK_LAUNCHES
