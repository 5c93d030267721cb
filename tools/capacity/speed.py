"""Speed bound of the MoE layers: arithmetic on the recorded loads.

A layer takes as long as its most loaded rank, so over the layer calls of a run

    S = sum of max_r(rows before) / sum of max_r(rows after)             the speed bound
    P = sum of max_r(rows before) / sum of mean_r(rows before)           perfect balance, no drops
    share of perfect balance = (1 - 1/S) / (1 - 1/P)                     of the time that could go

Worked example, 2 ranks, one call: 30 and 10 rows before, 24 and 10 after: S = 30/24 = 1.25, P =
30/20 = 1.5, the share is (1 - 0.8) / (1 - 2/3) = 0.6. It passes 1 where more is dropped than
balance needs.

Legend: W expert-parallel ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.distributed.groups import expert_range


@dataclass(frozen=True, slots=True)
class CallLoads:
    """Rows that each rank sends to each expert in one layer call, int64."""

    before_WE: np.ndarray  # before capacity
    after_WE: np.ndarray  # after it, extras included


@dataclass(frozen=True, slots=True)
class Speed:
    """The module's formulas; 1.0 where nothing was recorded."""

    bound: float  # S
    perfect: float  # P

    @property
    def share_of_perfect(self) -> float | None:
        """Share of perfect balance; None where the loads are balanced already."""
        if self.perfect <= 1.0:
            return None
        return (1 - 1 / self.bound) / (1 - 1 / self.perfect)


def rank_rows(counts_WE: np.ndarray) -> np.ndarray:
    """Return rows that each rank's experts receive, int64 [W], experts placed contiguously."""
    num_ranks, num_experts = counts_WE.shape
    starts = [expert_range(num_experts, num_ranks, rank)[0] for rank in range(num_ranks)]
    return np.add.reduceat(counts_WE.sum(0), starts)


def speed(calls: Sequence[CallLoads]) -> Speed:
    """Return S and P over the layer calls of a run."""
    before = [rank_rows(call.before_WE) for call in calls]
    slowest = sum(int(rows_W.max()) for rows_W in before)
    slowest_after = sum(int(rank_rows(call.after_WE).max()) for call in calls)
    mean = sum(float(rows_W.mean()) for rows_W in before)
    if not slowest_after or not mean:
        return Speed(1.0, 1.0)
    return Speed(slowest / slowest_after, slowest / mean)


def merge_calls(
    before: Sequence[Sequence[Sequence[int]]], after: Sequence[Sequence[Sequence[int]]]
) -> list[CallLoads]:
    """Combine the ranks' records.

    Args:
        before: [calls][W][E].
        after: [W][calls][E], each rank's own rows, extras included, unknown to other ranks.

    Raises:
        ValueError: ranks that recorded different numbers of calls.
    """
    if any(len(rows) != len(before) for rows in after):
        raise ValueError("the ranks recorded different numbers of layer calls")
    return [
        CallLoads(np.array(before[call]), np.array([rows[call] for rows in after]))
        for call in range(len(before))
    ]


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return indices of the Pareto front of points (speed, quality), slowest first.

    A point is off the front if another is at least as good in both and better in one; of equal
    points the first is kept.
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i))
    kept, best = [], float("-inf")
    for index in order:
        if points[index][1] > best:
            kept.append(index)
            best = points[index][1]
    return kept[::-1]
