"""Predict: the share of perfect balance that a placement gets with recorded loads.

Share = time of a step if all ranks were equally loaded, over the time of its slowest rank after the
split, both summed over steps. 1.0 is perfect.

Legend: S steps, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.moe.placement.candidate import Candidate
from engine.moe.placement.placement import LayerPlacement
from engine.moe.placement.problem import Problem

_SETS_UP_TO = 8  # ranks, of which all sets are tried
_SWEEPS = 96  # of the relaxation, above


def mean_times(
    loads_SE: np.ndarray, num_ranks: int, row_times_W: Sequence[float] | None = None
) -> np.ndarray:
    """Return how long every step takes where rows are spread perfectly, float64 [S]."""
    times_W = np.ones(num_ranks) if row_times_W is None else np.asarray(row_times_W, dtype=float)
    return loads_SE.sum(1) / (1 / times_W).sum()


def slowest_times(
    layer: LayerPlacement,
    loads_SE: np.ndarray,
    num_ranks: int,
    row_times_W: Sequence[float] | None = None,
) -> np.ndarray:
    """Return the time of the slowest rank of every step after the split, float64 [S].

    In rows where all ranks are equal. Up to 8 ranks it is the least there is; above, that of a
    split found by relaxation, which is at most a little slower.

    Args:
        layer: the placement.
        loads_SE: int64, rows of every expert per step.
        num_ranks: W.
        row_times_W: time per row of each rank; None: 1 for all.
    """
    times_W = np.ones(num_ranks) if row_times_W is None else np.asarray(row_times_W, dtype=float)
    if num_ranks <= _SETS_UP_TO:
        slowest_S = _over_sets(layer, loads_SE, times_W)
    else:
        slowest_S = rank_times(layer, loads_SE, num_ranks, row_times_W).max(0)
    if (times_W == 1).all():  # rows are whole; 1e-3: what float32 may add to a whole number
        return np.ceil(slowest_S * (1 - 1e-6) - 1e-3)
    return slowest_S


def rank_times(
    layer: LayerPlacement,
    loads_SE: np.ndarray,
    num_ranks: int,
    row_times_W: Sequence[float] | None = None,
) -> np.ndarray:
    """Return the time of every rank in every step after a split by relaxation, float64 [W, S]."""
    times_W = np.ones(num_ranks) if row_times_W is None else np.asarray(row_times_W, dtype=float)
    scale = max(float(loads_SE.sum(1).mean()), 1.0) / num_ranks
    loads_ES = np.ascontiguousarray(loads_SE.T / scale, dtype=np.float32)
    problem = Problem(loads_ES, times_W.astype(np.float32), (0,) * num_ranks)
    candidate = Candidate(problem, layer)
    candidate.cost(_SWEEPS)
    return candidate.load_WS.astype(np.float64) * times_W[:, None] * scale


def predicted_share(
    layer: LayerPlacement,
    loads_SE: np.ndarray,
    num_ranks: int,
    row_times_W: Sequence[float] | None = None,
) -> float:
    """Return the share of perfect balance after the split; 1.0 without rows."""
    return share(
        mean_times(loads_SE, num_ranks, row_times_W),
        slowest_times(layer, loads_SE, num_ranks, row_times_W),
    )


def share(mean_S: np.ndarray, slowest_S: np.ndarray) -> float:
    """Return the share of perfect balance of steps, given their ideal and their slowest times."""
    slowest = float(slowest_S.sum())
    return float(mean_S.sum()) / slowest if slowest else 1.0


def bound(
    loads_SE: np.ndarray, num_ranks: int, row_times_W: Sequence[float] | None = None
) -> float:
    """Return the share that no placement exceeds: ranks compute whole rows."""
    mean_S = mean_times(loads_SE, num_ranks, row_times_W)
    return share(mean_S, np.ceil(mean_S) if row_times_W is None else mean_S)


def _over_sets(layer: LayerPlacement, loads_SE: np.ndarray, times_W: np.ndarray) -> np.ndarray:
    """Return the greatest, over sets of ranks, of the rows that only the set may compute over what
    it computes in a unit of time.
    """
    num_ranks = len(times_W)
    hosts_E = np.array([sum(1 << r for r in layer.hosts(e)) for e in range(len(layer.home_E))])
    masks_Q = np.arange(1, 1 << num_ranks)
    inside_EQ = ((hosts_E[:, None] & ~masks_Q[None, :]) == 0).astype(np.float64)
    speeds_Q = ((masks_Q[:, None] >> np.arange(num_ranks)) & 1) @ (1 / times_W)
    return ((loads_SE.astype(np.float64) @ inside_EQ) / speeds_Q).max(1)
