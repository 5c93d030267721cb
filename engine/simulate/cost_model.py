"""Cost model: seconds of a layer's phases from tokens, rows and bytes.

    attention, gate, plan   fixed + per token of the rank; plan: what prepares and ends a layer
    experts                 max(least, fixed + per_row * sum over experts with rows of
                            max(rows, read_rows)): below read_rows an expert's weights are read in
                            the time that its rows take
    consensus, dispatch, combine
                            alpha + beta * bytes of the busiest rank + per_row * rows of that rank,
                            per hop; rows that leave a node take `network` beside it

Costs are of one model on one device: `fit.py` finds them from a job's spans, `figures.py` derives
them from what is assumed of a device.

Legend: W ranks, e experts and copies on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Seconds of a call."""

    fixed: float = 0.0
    per_token: float = 0.0

    def of(self, tokens_W: np.ndarray) -> np.ndarray:
        """Return the seconds of each rank, float64 [W]."""
        return self.fixed + self.per_token * tokens_W


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLine:
    """Seconds of a rank's experts."""

    least: float = 0.0
    fixed: float = 0.0
    per_row: float = 0.0
    read_rows: float = 0.0  # rows that take as long as reading an expert's weights

    def of(self, rows_e: np.ndarray) -> float:
        """Return the seconds for so many rows of each expert of the rank."""
        used = rows_e[rows_e > 0]
        work = float(np.maximum(used, self.read_rows).sum())
        return max(self.least, self.fixed + self.per_row * work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """Seconds of one collective over a link, from the last rank's arrival."""

    alpha: float = 0.0
    beta: float = 0.0  # per byte of the busiest rank, one direction
    per_row: float = 0.0  # of its rows, those for itself included

    def of(self, num_bytes: float, rows: float = 0.0) -> float:
        """Return the seconds."""
        return self.alpha + self.beta * num_bytes + self.per_row * rows


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """All costs of one model on one device."""

    name: str
    measured: str = ""  # where the costs come from; empty: they are assumed
    attention: Line
    gate: Line
    plan: Line
    experts: ExpertLine
    consensus: Hop
    dispatch: Hop
    combine: Hop
    network: Hop | None = None  # of rows that leave a node; None: as within
    step: Line = Line()  # of a step beside its layers
    host: float = 0.0  # of the host per layer: no layer is faster
    cores: int | None = None  # that a node's ranks share; None: every rank has its own


def makespan(seconds_W: np.ndarray, ranks_per_node: int, cores: int | None) -> float:
    """Return when the last rank is done, where a node's ranks may share cores evenly.

    Worked example, 2 cores and ranks that need 3, 3 and 6 seconds alone: each runs at 2/3 until the
    first two end at 4.5 s; the third has 3 s left and ends at 7.5 s.
    """
    if cores is None or cores >= min(ranks_per_node, len(seconds_W)):
        return float(seconds_W.max(initial=0.0))
    latest = 0.0
    for start in range(0, len(seconds_W), ranks_per_node):
        left = np.sort(seconds_W[start : start + ranks_per_node])
        now = done = 0.0
        for index, each in enumerate(left.tolist()):
            active = len(left) - index
            now += (each - done) * max(1.0, active / cores)
            done = each
        latest = max(latest, now)
    return latest
