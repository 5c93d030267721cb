"""Problem: what the search for a placement is given, and which steps it minimises over.

Legend: S steps, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MARGIN = 1.0  # above, plans were worse for later steps than with it, below as well
_MOST_STEPS = 256  # searched over; of more recorded steps, so many at equal distances
_QUARTERS = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """What is searched for: the loads of one layer, and what a placement costs."""

    loads_ES: np.ndarray  # float32; the mean rank's time, over steps, is 1
    times_W: np.ndarray  # float32, time per row of each rank
    slots_W: tuple[int, ...]  # most copies of each rank
    node_W: np.ndarray | None = None  # int64, the node of each rank; None: one node
    node_cost: float = 0.0  # of a row that leaves a node, in rows of the slowest rank
    worst: float = 0.3  # weight of the worst step beside the mean step
    num_imagined: int = 0  # of the steps, those that were not recorded

    @property
    def num_experts(self) -> int:
        """Return E."""
        return len(self.loads_ES)

    @property
    def num_ranks(self) -> int:
        """Return W."""
        return len(self.times_W)


def make_problem(
    domains: Mapping[str, np.ndarray],
    num_ranks: int,
    slots_W: Sequence[int],
    row_times_W: Sequence[float] | None = None,
    nodes: int | None = None,
    node_cost: float = 0.0,
    margin: float = MARGIN,
    imagined: int = 0,
) -> Problem:
    """Return what is searched for: the steps of each domain and of all mixed, in equal parts.

    Args:
        domains: int64 [S, E] loads of each domain of traffic.
        num_ranks: W.
        slots_W: most copies of each rank.
        row_times_W: time per row of each rank; None: ranks are equal.
        nodes: of the ranks.
        node_cost: of a row that leaves its node.
        margin: where loads drift, half of the steps are imagined: every expert's load is off by
            a draw of its own, of so many standard deviations of the recorded drift. Loads of later
            steps are further off than recorded ones show, and a plan for these alone would fit them
            too closely. 0: recorded steps alone.
        imagined: seed of the imagined steps.

    Raises:
        ValueError: there are more ranks than experts, or no loads.
    """
    if not domains:
        raise ValueError("domains = {}: loads of at least one domain are needed")
    for name, loads_SE in domains.items():
        if loads_SE.ndim != 2 or not loads_SE.sum():
            raise ValueError(f"domain {name!r}: no recorded rows; record a job with tokens")
        if loads_SE.shape[1] < num_ranks:
            raise ValueError(
                f"num_ranks = {num_ranks}: every rank is the home of an expert, and there are "
                f"{loads_SE.shape[1]}"
            )
    parts = [*domains.values()]
    if len(parts) > 1:
        parts.append(mixed_steps(domains))
    times_W = np.ones(num_ranks) if row_times_W is None else np.asarray(row_times_W, dtype=float)
    speed = float((1 / times_W).sum())
    most = max(1, _MOST_STEPS // len(parts) // (2 if margin else 1))
    draw = np.random.default_rng(imagined)
    loads: list[np.ndarray] = []
    num_imagined = 0
    for loads_SE in parts:
        kept_SE = loads_SE[loads_SE.sum(1) > 0].astype(np.float64)
        if len(kept_SE) > most:
            kept_SE = kept_SE[np.linspace(0, len(kept_SE) - 1, most).astype(np.int64)]
        kept_SE *= speed / kept_SE.sum(1).mean()
        loads.append(kept_SE)
        if margin and (off := margin * _drift(kept_SE)):
            loads.append(kept_SE * np.exp(off * draw.standard_normal(kept_SE.shape)))
            num_imagined += len(kept_SE)
    loads_ES = np.ascontiguousarray(np.concatenate(loads).T, dtype=np.float32)
    node_W = None
    if nodes is not None and nodes > 1:
        node_W = np.arange(num_ranks) * nodes // num_ranks
    return Problem(
        loads_ES,
        times_W.astype(np.float32),
        tuple(slots_W),
        node_W,
        node_cost / num_ranks,
        num_imagined=num_imagined,
    )


def mixed_steps(domains: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return steps with as many rows of every domain: sums of a step of each, float64 [S, E].

    A domain with fewer steps than another is repeated. Rows per step are the mean of all domains'.
    """
    count = max(len(loads_SE) for loads_SE in domains.values())
    rows = {name: float(loads_SE.sum(1).mean()) for name, loads_SE in domains.items()}
    mean = sum(rows.values()) / len(rows)
    mixed_SE = np.zeros((count, next(iter(domains.values())).shape[1]))
    for name, loads_SE in domains.items():
        if rows[name]:
            picked_SE = loads_SE[np.arange(count) % len(loads_SE)]
            step_S = np.maximum(picked_SE.sum(1, keepdims=True), 1)
            mixed_SE += picked_SE * (mean / len(domains) / step_S)
    return mixed_SE


def _drift(loads_SE: np.ndarray) -> float:
    """Return how far an expert's log share of the rows drifts: its standard deviation between
    quarters of the steps, pooled by rows, less what noise from step to step explains of it.

    0 where there are too few steps to tell drift from noise.
    """
    if len(loads_SE) < 2 * _QUARTERS:
        return 0.0
    share_SE = loads_SE / loads_SE.sum(1, keepdims=True)
    mean_E = share_SE.mean(0)
    logs_SE = np.log(np.maximum(share_SE, 1e-2 * mean_E + 1e-12))
    quarters = np.array_split(logs_SE, _QUARTERS)
    between_E = np.array([each.mean(0) for each in quarters]).var(0, ddof=1)
    noise_E = np.mean([each.var(0, ddof=1) / len(each) for each in quarters], axis=0)
    return float(np.sqrt(max(0.0, ((between_E - noise_E) * mean_E).sum() / mean_E.sum())))
