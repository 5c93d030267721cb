"""Link: a short measurement of what an all-to-all of the expert-parallel group costs, on CUDA.

Thresholds of traffic (deduplication, chunks, gather or histograms) weigh bytes against calls and
launches; within a node a link carries thirty times the bytes of one between nodes in that time. On
the CPU nothing is measured: the thresholds are `COLLECTIVE_BYTES` there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from engine.distributed.collectives import GroupCollectives
from engine.distributed.groups import Group, Link

logger = logging.getLogger(__name__)

_SMALL, _LARGE = 1024, 16 << 20  # bytes that a rank sends to all ranks together
_ROUNDS, _CALLS, _LAUNCHES = 3, 4, 64


def measure_link(group: Group, control: Group, device: torch.device) -> Link | None:
    """Return the cost of the group's all-to-alls on its slowest rank; the same on every rank.

    None on the CPU and in a group of one rank.

    Args:
        group: whose link is measured.
        control: the same ranks, for host data.
        device: of the group's tensors.

    Collective over both: every rank must call.
    """
    if device.type != "cuda" or group.size == 1:
        return None
    small_s, large_s = (_all_to_all_s(num_bytes, group, device) for num_bytes in (_SMALL, _LARGE))
    own = torch.tensor([small_s, large_s, _launch_s(device)], dtype=torch.float64)
    slowest = GroupCollectives(control).all_gather(own).wait().amax(0).tolist()
    link = link_of(slowest[0], slowest[1], slowest[2], group.size)
    if group.rank == 0:
        logger.info(
            "all-to-all of %d ranks: %.0f us and %.1f GB/s per rank; %.1f us per launch",
            group.size,
            1e6 * link.latency_s,
            link.bytes_per_s / 1e9,
            1e6 * link.launch_s,
        )
    return link


def link_of(small_s: float, large_s: float, launch_s: float, size: int) -> Link:
    """Return the link that a small and a large all-to-all show.

    Args:
        small_s, large_s: seconds of each.
        launch_s: seconds of one small kernel.
        size: of the group; the part of a rank for itself is not sent.
    """
    sent = (_LARGE - _SMALL) * (size - 1) / size
    # A large one that is no slower than a small one says only that the link is fast.
    return Link(small_s, sent / max(large_s - small_s, 0.05 * large_s), launch_s)


def _all_to_all_s(num_bytes: int, group: Group, device: torch.device) -> float:
    sent = torch.zeros(num_bytes // group.size * group.size, dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    return _seconds(lambda: dist.all_to_all_single(received, sent, group=group.handle), _CALLS)


def _launch_s(device: torch.device) -> float:
    number = torch.zeros(1, device=device)
    return _seconds(lambda: number.add_(1), _LAUNCHES)


def _seconds(call: Callable[[], object], num_calls: int) -> float:
    """Return the least seconds of a call, with its share of one wait for the device."""
    call()  # the first one opens connections
    best = float("inf")
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()  # SYNC: before the first step; what ran is timed
        start = time.perf_counter()
        for _ in range(num_calls):
            call()
        torch.cuda.synchronize()  # SYNC: as above
        best = min(best, (time.perf_counter() - start) / num_calls)
    return best
