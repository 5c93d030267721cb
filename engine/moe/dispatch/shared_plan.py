"""Shared plan: how many shared rows move between every two ranks, computed alike on every rank.

See `shared_rows.py`. The load of a rank is its rows of routed experts, and its shared rows times
their cost: the shared expert's hidden dim over the routed experts'. All numbers are integers.

Worked example, 2 ranks, cost 1, 6 tokens each, rows of routed experts 20 and 4: loads 26 and 10,
mean 18. Rank 0 has to lose 8 rows and has 6 candidates, so the line is 20: all 6 move, loads 20 and
16.

Legend: W ranks.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

_TRIES = 8  # lines that a plan tries, each with a loop over the ranks


def plan_moves(
    rows_W: np.ndarray, tokens_W: np.ndarray, candidates_WW: np.ndarray, cost: Fraction
) -> np.ndarray:
    """Return how many shared rows move from each rank to each, int64 [W, W]; pure.

    No rank ends above a line that lies below the most loaded rank's load; ranks above it lose what
    they have above it, no more. The line is the lowest of a few tries: first the mean, or what a
    rank has left when all its candidates are gone; then one row more, since rows move whole; then
    by halves between what did not work and what did.

    Args:
        rows_W: int64, rows of routed experts that each rank computes.
        tokens_W: int64, its tokens.
        candidates_WW: int64, at most so many move from each rank to each.
        cost: of a shared row, in rows of routed experts.
    """
    unit = cost.numerator
    load_W = cost.denominator * rows_W + unit * tokens_W
    low = max(
        -(-int(load_W.sum()) // len(load_W)),
        int((load_W - unit * candidates_WW.sum(1)).max()),
    )
    high, best_WW = int(load_W.max()), np.zeros_like(candidates_WW)
    # What a rank holds has to fit its buffers, whatever a shared row costs.
    fits_W = rows_W.max() + tokens_W.max() - rows_W
    line = low
    for attempt in range(_TRIES):
        if line >= high:
            break
        room_W = ((line - load_W) // unit).clip(0, fits_W)
        need_W = -((line - load_W) // unit).clip(None, 0)
        found_WW = _fill(need_W, room_W, candidates_WW)
        if found_WW is None:
            low = line + 1
        else:
            best_WW, high = found_WW, line
        if high - low <= unit:
            break
        line = low + unit if attempt == 0 else (low + high) // 2
    return best_WW


def _fill(need_W: np.ndarray, room_W: np.ndarray, candidates_WW: np.ndarray) -> np.ndarray | None:
    """Return rows from ranks that need to lose some to ranks that have room; None: some are left.

    Ranks with least choice first, to where most room is first; ties to the lower rank.
    """
    if need_W.sum() > room_W.sum():
        return None
    choice_W = np.minimum(candidates_WW, room_W).sum(1) - need_W
    if (choice_W < 0).any():
        return None
    moved_WW, room_W = np.zeros_like(candidates_WW), room_W.copy()
    for source in np.argsort(choice_W, kind="stable").tolist():
        if not need_W[source]:
            continue
        order_W = np.argsort(-room_W, kind="stable")
        most_W = np.minimum(candidates_WW[source], room_W)[order_W]
        taken_W = (need_W[source] - (most_W.cumsum() - most_W)).clip(0, most_W)
        if taken_W.sum() < need_W[source]:
            return None
        moved_WW[source, order_W] = taken_W
        room_W[order_W] -= taken_W
    return moved_WW
