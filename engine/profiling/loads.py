"""Load counters: rows of each expert and each rank, per layer, before capacity and after it.

Loads before capacity result from the agreement, so every rank of an expert-parallel group has the
same numbers. Loads after capacity are known for a rank's own experts only (extras never leave their
rank); the ranks exchange their sums with the control message of the next step, see
`generation/control.py`.

Legend: E experts, W expert-parallel ranks, L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.profiling.late_loads import LateLoads

# Of one step: layer -> rows of every expert before capacity, of this rank's own after it.
StepLoads = dict[int, tuple[np.ndarray, list[int]]]


@dataclass(slots=True)
class LayerLoad:
    """Totals of one MoE layer over the run."""

    experts: np.ndarray  # int64 [E], top-k assignments of each expert, before capacity
    own_after: np.ndarray  # int64, rows that each of this rank's experts and copies processed
    own_experts: list[int]  # their numbers
    slowest: float = 0.0  # sum over steps of the most loaded rank's rows, before capacity
    mean: float = 0.0  # sum over steps of the mean rank's rows, before capacity
    slowest_after: float = 0.0  # the same after capacity
    mean_after: float = 0.0
    slowest_time: float = 0.0  # slowest_after with each rank's rows times its time per row

    def add_after(self, own_experts: list[int], own_after: list[int]) -> None:
        """Add rows after copies have changed: those of an expert that is new come last."""
        if new := [expert for expert in own_experts if expert not in self.own_experts]:
            self.own_experts = [*self.own_experts, *new]
            self.own_after = np.append(self.own_after, np.zeros(len(new), dtype=np.int64))
        places = [self.own_experts.index(expert) for expert in own_experts]
        self.own_after[places] += own_after

    @property
    def max_over_mean(self) -> float:
        """Rows of the most loaded rank over the mean rank before capacity, weighted by rows.

        1.0 is perfect balance.
        """
        return self.slowest / self.mean if self.mean else 1.0

    @property
    def max_over_mean_after(self) -> float:
        """Return the same after capacity."""
        return self.slowest_after / self.mean_after if self.mean_after else 1.0

    @property
    def share(self) -> float:
        """Share of perfect balance: the mean rank's rows before capacity over those of the most
        loaded rank, every expert at its home.
        """
        return self.mean / self.slowest if self.slowest else 1.0

    @property
    def share_after(self) -> float:
        """Return the same with the most loaded rank's rows after capacity and the split."""
        return self.mean / self.slowest_after if self.slowest_after else 1.0


@dataclass(slots=True)
class LayerDrops:
    """What capacity did to one rank's own tokens in one layer, over a run.

    Of tokens subject to capacity only.
    """

    routed: int = 0  # top-k assignments to experts
    dropped: int = 0  # of them
    added: int = 0  # extras
    orphans: int = 0  # tokens that kept no expert, and no zero expert
    mass: float = 0.0  # combine weights of the original top-k
    mass_kept: float = 0.0  # of those that survived
    zero: int = 0  # assignments to zero experts, in none of the numbers above

    def add(self, other: LayerDrops) -> None:
        """Add `other` to this."""
        self.routed += other.routed
        self.dropped += other.dropped
        self.added += other.added
        self.orphans += other.orphans
        self.mass += other.mass
        self.mass_kept += other.mass_kept
        self.zero += other.zero


@dataclass(slots=True)
class LoadCounter:
    """Loads of all MoE layers on one rank."""

    layers: dict[int, LayerLoad] = field(default_factory=dict)
    step: StepLoads | None = None  # the loads of the current step, where it is a dict
    # Layer -> rows of the shared expert that moved, of all ranks; empty where none may.
    shared_moved: dict[int, int] = field(default_factory=dict)
    row_times_W: np.ndarray | None = None  # float64, of each rank as planned; None: 1 for all
    late: LateLoads = field(default_factory=LateLoads)  # counted on a GPU and not read yet
    _rows: dict[int, int] = field(default_factory=dict)
    _taken: list[int] = field(default_factory=list)
    _step_slowest: float = 0.0
    _step_mean: float = 0.0

    def record(
        self,
        layer: int,
        *,
        before_E: np.ndarray,
        rank_before: list[int],
        own_after: list[int],
        own_experts: list[int],
        after_W: np.ndarray | None = None,
    ) -> None:
        """Add one layer of one step.

        Args:
            before_E: int64 [E], top-k assignments of every expert over all ranks.
            rank_before: the same summed over the experts whose home is each rank.
            own_after: rows that each of this rank's experts and copies processes.
            own_experts: their numbers.
            after_W: int64, rows of every rank where they are known here; None: the ranks exchange
                theirs (`take_rows`).
        """
        totals = self.layers.get(layer)
        if totals is None:
            totals = self.layers[layer] = LayerLoad(
                np.zeros_like(before_E), np.zeros(len(own_after), dtype=np.int64), own_experts
            )
        totals.experts += before_E
        if own_experts == totals.own_experts:
            totals.own_after += own_after
        else:
            totals.add_after(own_experts, own_after)
        if after_W is None:
            self._rows[layer] = sum(own_after)
        else:
            self._add_after(totals, after_W)
        if self.step is not None:
            self.step[layer] = (before_E, own_after)
        slowest, mean = max(rank_before), sum(rank_before) / len(rank_before)
        totals.slowest += slowest
        totals.mean += mean
        self._step_slowest += slowest
        self._step_mean += mean

    def add_shared(self, layer: int, num_moved: int) -> None:
        """Add the rows of the shared expert that moved between ranks in one call."""
        self.shared_moved[layer] = self.shared_moved.get(layer, 0) + num_moved

    def take_rows(self) -> list[int]:
        """Return and reset the rows of this rank's experts in each layer of the last step.

        [] if there was none since the last call.
        """
        self._taken = sorted(self._rows)
        rows = [self._rows[layer] for layer in self._taken]
        self._rows.clear()
        return rows

    def set_exchanged(self, rows_WL: np.ndarray) -> None:
        """Add the rows of all ranks: int64 [W, L], for the layers of the last `take_rows`."""
        for layer, rows_W in zip(self._taken, rows_WL.T, strict=True):
            self._add_after(self.layers[layer], rows_W)

    def _add_after(self, totals: LayerLoad, rows_W: np.ndarray) -> None:
        """Add every rank's rows of one layer of one step."""
        totals.slowest_after += float(rows_W.max())
        totals.mean_after += float(rows_W.mean())
        times_W = rows_W if self.row_times_W is None else rows_W * self.row_times_W
        totals.slowest_time += float(times_W.max())

    def clear(self) -> None:
        """Reset all counts."""
        self.layers.clear()
        self.shared_moved.clear()
        self._rows.clear()
        self.late.clear()
        self._step_slowest = self._step_mean = 0.0

    def end_step(self, *, waited: bool = True) -> None:
        """Read what calls of a GPU have left of the step before this one; of this one where the
        loads of single steps are recorded.

        waited: whether the host has waited for what this step computed.
        """
        self.late.end_step(wait=self.step is not None, waited=waited)

    def reset_step(self) -> float:
        """Return and reset max over mean of the ranks' rows before capacity, of the last step."""
        value = self._step_slowest / self._step_mean if self._step_mean else 1.0
        self._step_slowest = self._step_mean = 0.0
        return value

    def max_over_mean(self) -> float:
        """Return max over mean of the ranks' rows before capacity, over all layers."""
        mean = sum(load.mean for load in self.layers.values())
        return sum(load.slowest for load in self.layers.values()) / mean if mean else 1.0

    def max_over_mean_after(self) -> float:
        """Return the same after capacity."""
        mean = sum(load.mean_after for load in self.layers.values())
        return sum(load.slowest_after for load in self.layers.values()) / mean if mean else 1.0

    def share(self) -> float:
        """Return `LayerLoad.share` over all layers."""
        value = self.max_over_mean()
        return 1 / value if value else 1.0

    def share_after(self) -> float:
        """Return `LayerLoad.share_after` over all layers."""
        after = sum(load.slowest_after for load in self.layers.values())
        return sum(load.mean for load in self.layers.values()) / after if after else 1.0

    def speed_bound(self) -> float:
        """Return the most loaded rank's rows before capacity over after it, all layers and steps.

        An upper bound of the factor by which capacity made the MoE layers faster.
        """
        after = sum(load.slowest_after for load in self.layers.values())
        return sum(load.slowest for load in self.layers.values()) / after if after else 1.0
