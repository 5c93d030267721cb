"""Prediction: what is predicted of a scenario, by layer and in all.

Legend: S steps, W ranks of one replica.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.simulate.scenario import Scenario


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPrediction:
    """One MoE layer over all steps and replicas."""

    layer: int
    rows_SW: np.ndarray  # int64, computed by each rank of the first replica, step by step
    seconds_S: np.ndarray  # float64, of the first replica
    most_rows: float  # of the most loaded rank, the mean over steps and replicas
    mean_rows: float  # of the mean rank before capacity
    routed: int  # assignments subject to capacity
    dropped: int
    parts: dict[str, float]  # mean seconds by part of a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is predicted of a scenario; seconds are means over steps and replicas."""

    scenario: Scenario
    layers: list[LayerPrediction]
    is_exact: bool  # rows of every rank are those of the engine with these loads
    tokens: float  # of a step over all ranks
    consensus_bytes: float  # of a rank and layer
    memory_bytes: int | None
    step_seconds: float | None  # of the slower replica, its MoE layers; None: no costs
    waiting: float | None  # share of that time in which the mean rank waits for slower ones

    @property
    def share(self) -> float:
        """Rows of the mean rank before capacity over those of the most loaded rank after it."""
        most = sum(each.most_rows for each in self.layers)
        return sum(each.mean_rows for each in self.layers) / most if most else 1.0

    @property
    def drop_rate(self) -> float:
        """Share of the assignments subject to capacity that is dropped."""
        routed = sum(each.routed for each in self.layers)
        return sum(each.dropped for each in self.layers) / routed if routed else 0.0

    @property
    def layer_seconds(self) -> float | None:
        """Seconds of a mean layer; None: no costs."""
        if self.step_seconds is None:
            return None
        return sum(sum(each.parts.values()) for each in self.layers) / len(self.layers)
