"""The process groups of a run on emulated CUDA: what travels over NCCL and what on the host.

Run: pytest tests/gpu/emulated/test_groups.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from engine.config.loader import config_from_tree
from engine.distributed import bootstrap
from engine.distributed.collectives import broadcast_object, gather_objects
from engine.ops import lane
from tests.gpu.emulated.cuda import emulated_cuda
from tests.gpu.emulated.device import DEVICE
from tests.gpu.emulated.guard import obstacle
from tests.gpu.emulated.nccl import BACKEND as NCCL
from tests.gpu.emulated.nccl import NcclGroup
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=f"not emulated: {obstacle()}")

NAMES = ("world", "expert", "tensor", "control", "counts", "host_world", "host_tensor")


def groups_of(rank: int, guard: Path, parallel: dict[str, Any], shared: bool) -> dict[str, Any]:
    """Start a run; return each group's backend, and what was found out about them."""
    tree = {
        "model": {"path": "unused"},
        "parallel": parallel,
        "runtime": {"device": "cuda", "shared_memory": shared, "timeout_s": 30.0},
    }
    if int(os.environ["WORLD_SIZE"]) == 1:
        for name in ("RANK", "WORLD_SIZE"):
            del os.environ[name]
    with emulated_cuda(guard):
        topology = bootstrap.start(config_from_tree(tree))
        found: dict[str, Any] = {name: _backend(getattr(topology, name)) for name in NAMES}
        handles = {id(each.handle): each.handle for each in topology.groups}
        nccl = [each for each in handles.values() if isinstance(each, NcclGroup)]
        found["high"] = all(each.is_high_priority for each in nccl)
        found["communicators"] = len(nccl)
        found["objects"] = [
            broadcast_object(f"of {rank}", topology.host_tensor),
            *gather_objects(rank, topology.host_world),
        ]
        found["syncs"] = dict(DEVICE.syncs)
        found["store"] = type(topology.store).__name__
        bootstrap.stop(topology)
    return found


def _backend(group: Any) -> str:
    return "one rank" if group.size == 1 else dist.get_backend(group.handle)


def test_rows_and_counts_travel_over_nccl_at_high_priority_and_objects_on_the_host(
    guard: Path,
) -> None:
    parallel = {"expert": 4, "tensor": 2}
    for rank, found in enumerate(run_ranks(groups_of, 4, guard, parallel, False)):
        assert [found[name] for name in NAMES] == [NCCL] * 3 + ["gloo", NCCL, "gloo", "gloo"]
        assert found["high"]
        assert found["communicators"] == 3  # expert is the world
        assert found["objects"] == [f"of {rank - rank % 2}", 0, 1, 2, 3]
        assert found["syncs"] == {}


def test_a_group_of_one_rank_has_no_nccl_communicator(guard: Path) -> None:
    for found in run_ranks(groups_of, 2, guard, {"expert": 1}, False):
        assert [found[name] for name in NAMES] == [NCCL, *["one rank"] * 4, "gloo", "one rank"]
        assert found["communicators"] == 1


@pytest.mark.skipif(not lane.available(), reason="no compiled library")
def test_data_of_the_host_travels_in_shared_memory_on_cuda_too(guard: Path) -> None:
    for found in run_ranks(groups_of, 4, guard, {"expert": 2, "tensor": 2}, True):
        assert [found[name] for name in NAMES] == [NCCL] * 3 + ["shared_memory", NCCL] + [
            "shared_memory"
        ] * 2
        assert found["syncs"] == {}


def test_one_rank_on_a_gpu_has_a_store_that_nccl_is_used_with(guard: Path) -> None:
    (found,) = run_ranks(groups_of, 1, guard, {}, True)
    assert found["store"] == "TCPStore"
    assert found["communicators"] == 1


def handling_of(rank: int, guard: Path, is_watched: bool, own: str | None) -> str:
    """Start a run; return what NCCL's own thread does once a collective has failed."""
    if own is not None:
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = own
    with emulated_cuda(guard):
        tree = {"model": {"path": "unused"}, "runtime": {"device": "cuda"}}
        topology = bootstrap.start(config_from_tree(tree), is_watched=is_watched)
        bootstrap.stop(topology)
    return os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]


@pytest.mark.parametrize(
    ("is_watched", "own", "expected"), [(True, None, "0"), (False, None, "3"), (True, "1", "1")]
)
def test_nccl_ends_a_process_only_where_no_watchdog_does(
    guard: Path, is_watched: bool, own: str | None, expected: str
) -> None:
    assert run_ranks(handling_of, 2, guard, is_watched, own) == [expected] * 2
