"""Load counters: how many assignments each expert and each rank had, layer by layer.

The loads are the exchanged counts, so every rank of an expert-parallel group holds the same
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class LayerLoad:
    """Totals of one MoE layer over the run.

    experts: int64 [E], assignments of each expert. slowest: sum over steps of the most loaded
    rank's rows. mean: sum over steps of the mean rank's rows.
    """

    experts: np.ndarray
    slowest: float = 0.0
    mean: float = 0.0

    @property
    def max_over_mean(self) -> float:
        """Rows of the most loaded rank over the mean rank, weighted by rows; 1.0 is perfect
        balance.
        """
        return self.slowest / self.mean if self.mean else 1.0


@dataclass(slots=True)
class LoadCounter:
    """Collects `LayerLoad`s; `step_max_over_mean` is the imbalance since the last `reset_step`."""

    layers: dict[int, LayerLoad] = field(default_factory=dict)
    _step_slowest: float = 0.0
    _step_mean: float = 0.0

    def record(self, layer: int, expert_loads: np.ndarray, rank_loads: list[int]) -> None:
        """Add one layer of one step. expert_loads: int64 [E]; rank_loads: rows each rank
        works on.
        """
        totals = self.layers.get(layer)
        if totals is None:
            totals = self.layers[layer] = LayerLoad(np.zeros_like(expert_loads))
        totals.experts += expert_loads
        slowest, mean = max(rank_loads), sum(rank_loads) / len(rank_loads)
        totals.slowest += slowest
        totals.mean += mean
        self._step_slowest += slowest
        self._step_mean += mean

    def clear(self) -> None:
        """Forget everything; a new run begins."""
        self.layers.clear()
        self._step_slowest = self._step_mean = 0.0

    def reset_step(self) -> float:
        """Return max over mean rank load of the step that ends here, and start the next one."""
        ratio = self._step_slowest / self._step_mean if self._step_mean else 1.0
        self._step_slowest = self._step_mean = 0.0
        return ratio

    def max_over_mean(self) -> float:
        """Max over mean rank load of the whole run, layers weighted by their rows."""
        mean = sum(load.mean for load in self.layers.values())
        return sum(load.slowest for load in self.layers.values()) / mean if mean else 1.0
