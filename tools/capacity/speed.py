"""How much faster the MoE layers can have become: arithmetic on the recorded loads.

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
    """One layer call: rows each rank sends to each expert, int64 [W, E], before capacity and after
    it, extras included.
    """

    before_WE: np.ndarray
    after_WE: np.ndarray


@dataclass(frozen=True, slots=True)
class Speed:
    """bound: S. perfect: P; both 1.0 where nothing was recorded. See the module's formulas."""

    bound: float
    perfect: float

    @property
    def share_of_perfect(self) -> float | None:
        """None where the loads are balanced already, so that there is nothing to gain."""
        if self.perfect <= 1.0:
            return None
        return (1 - 1 / self.bound) / (1 - 1 / self.perfect)


def rank_rows(counts_WE: np.ndarray) -> np.ndarray:
    """Rows each rank's experts receive, int64 [W], experts placed contiguously."""
    num_ranks, num_experts = counts_WE.shape
    starts = [expert_range(num_experts, num_ranks, rank)[0] for rank in range(num_ranks)]
    return np.add.reduceat(counts_WE.sum(0), starts)


def speed(calls: Sequence[CallLoads]) -> Speed:
    """S and P over the layer calls of a run."""
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
    """Put the ranks' records together.

    before: [calls][W][E]. after: [W][calls][E], each rank's own rows, extras included, which the
    other ranks do not know.

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
    """Indices of the points (speed, quality) that no other point beats, slowest first.

    A point is beaten by one that is at least as good in both and better in one; of equal points the
    first stays.
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i))
    kept, best = [], float("-inf")
    for index in order:
        if points[index][1] > best:
            kept.append(index)
            best = points[index][1]
    return kept[::-1]
