"""Boundaries between the experts of the ranks."""

from __future__ import annotations

from engine.distributed.groups import expert_range


def bounds(num_experts: int, num_ranks: int) -> list[int]:
    """Return the first expert of every rank, and the end: num_ranks + 1 boundaries."""
    starts = [expert_range(num_experts, num_ranks, rank)[0] for rank in range(num_ranks)]
    return [*starts, num_experts]
