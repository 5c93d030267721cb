"""Ranks of one host over shared memory: the same results as gloo, and faults that are reported.

Run: pytest tests/distributed/test_shared_memory.py
"""

from __future__ import annotations

import os
import signal
import socket
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.config import Config, ModelConfig, RuntimeConfig
from engine.distributed import bootstrap
from engine.distributed.collectives import all_gather_rows, broadcast_object, gather_objects
from engine.distributed.groups import Topology
from engine.distributed.shared_memory import BACKEND
from engine.ops import lane as lane_op
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    not lane_op.available(), reason="without the compiled library ranks communicate over gloo"
)


def join(timeout_s: float = 20.0, shared_memory: bool = True) -> Topology:
    runtime = RuntimeConfig(timeout_s=timeout_s, shared_memory=shared_memory)
    return bootstrap.start(Config(model=ModelConfig(path="unused"), runtime=runtime))


def some_rows(rank: int, num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + num_rows)
    return torch.randn(num_rows, 33, generator=generator)


def collectives(rank: int, shared_memory: bool) -> list[Any]:
    """Run everything that the engine calls; return the results in order."""
    topology = join(shared_memory=shared_memory)
    group, size = topology.expert, topology.expert.size
    results: list[Any] = [dist.get_backend(group.handle), dist.get_backend(topology.control.handle)]
    results.append(all_gather_rows(some_rows(rank, 3), group))
    results.append(gather_objects({"rank": rank, "text": "x" * (rank * 1000)}, topology.control))
    results.append(broadcast_object("of 0" if rank == 0 else None, topology.control))
    total = torch.arange(7) + rank
    dist.all_reduce(total, group=group.handle)
    results.append(total)
    root = torch.full((3,), rank)
    dist.broadcast(root, src=size - 1, group=group.handle)
    results.append(root)
    dist.barrier(group.handle)
    # Three in flight at once: one larger than a ring, one with nothing for some ranks, one empty.
    in_flight = []
    for scale in (5000, 1, 0):
        rows_to = [[scale * (a + b) * (a != 1) for b in range(size)] for a in range(size)]
        sent, received = rows_to[rank], [row[rank] for row in rows_to]
        rows, into = some_rows(rank, sum(sent)), torch.empty(sum(received), 33)
        work = dist.all_to_all_single(into, rows, received, sent, group=group.handle, async_op=True)
        in_flight.append((work, into, rows))
    for work, into, _ in in_flight:
        work.wait()
        work.wait()
        results.append(into)
    even = torch.empty(size, 33)
    dist.all_to_all_single(even, some_rows(rank, size), group=group.handle)
    results.append(even)
    bootstrap.stop(topology)
    return results


@pytest.mark.parametrize("world", [2, 3, 5])
def test_every_collective_gives_what_gloo_gives(world: int):
    memory, network = run_ranks(collectives, world, True), run_ranks(collectives, world, False)
    for own, other in zip(memory, network, strict=True):
        assert own[:2] == [BACKEND, BACKEND] and other[:2] == ["gloo", "gloo"]
        for one, two in zip(own[2:], other[2:], strict=True):
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def failure(rank: int, fault: str) -> str:
    """Return rank 0's error when rank 1 has a fault; only a late rank is found by the timeout."""
    topology = join(timeout_s=1.0 if fault == "late" else 3600.0)
    group = topology.expert
    rows = torch.zeros(2, 4)
    dist.all_to_all_single(torch.empty_like(rows), rows, group=group.handle)
    if rank == 1 and fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and fault == "exits":
        bootstrap.stop(topology)
        return ""
    if rank == 1 and fault == "late":
        time.sleep(3.0)
        return ""
    try:
        if rank == 1 and fault == "skips":
            all_gather_rows(rows, group)
        else:
            dist.all_to_all_single(torch.empty_like(rows), rows, group=group.handle)
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("exits", "connection closed by rank 1"),
        ("late", "timed out after"),
        ("skips", "the ranks do not call the same collectives"),
    ],
)
def test_a_missing_rank_is_named_in_the_error_of_the_waiting_rank(fault: str, message: str):
    error, _ = run_ranks(failure, 2, fault)
    assert message in error and "rank 1" in error and f"[{BACKEND}]" in error


def survivor(rank: int) -> None:
    """Raise, on rank 0, the error that it got from the death of rank 1."""
    raise AssertionError(failure(rank, "killed"))


def test_a_killed_rank_is_detected_at_once():
    with pytest.raises(AssertionError, match="connection closed by rank 1") as failed:
        run_ranks(survivor, 2)
    assert "exit code -9" in str(failed.value)


def backends(rank: int, what: str) -> list[str]:
    """Return the backends of a run in which rank 1 lacks something."""
    patch = pytest.MonkeyPatch()
    if rank == 1 and what == "library":
        patch.setattr(lane_op, "available", lambda: False)
    if rank == 1 and what == "memory":

        def refuse(size: int) -> int:
            raise OSError("no memory")

        patch.setattr(lane_op, "make_segment", refuse)
    if rank == 1 and what == "same host":
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
    if rank == 1 and what == "access to the others":
        real = os.open
        elsewhere = lambda path, *rest: real(str(path).replace("/proc", "/nothing"), *rest)  # noqa: E731
        patch.setattr(os, "open", elsewhere)
    topology = join()
    assert all_gather_rows(torch.tensor([rank]), topology.expert).tolist() == [0, 1, 2]
    names = [dist.get_backend(group.handle) for group in (topology.expert, topology.control)]
    bootstrap.stop(topology)
    return names


@pytest.mark.parametrize("what", ["library", "memory", "same host", "access to the others"])
def test_where_one_rank_cannot_use_it_all_communicate_over_gloo(what: str):
    for names in run_ranks(backends, 3, what):
        assert names == ["gloo", "gloo"]
