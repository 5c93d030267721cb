"""Collector: from the spans of every step to one rank's totals, layer by layer and phase by phase.

`loop.py` hands it each step's spans, with every rank's arrivals where the control words have
brought them. It adds up where this rank's time, tokens and bytes went, how long it waited, and for
whom the group waited: at every collective the rank that arrived last is charged with what the
others lost, on average, by its coming late (`charging.py`). The charge depends on the exchanged
arrivals alone, so every rank of the group holds the same numbers; how long a step was, each
measures for itself.

Several steps are added up at a time: per step that costs microseconds.

Worked example, 3 ranks that arrive at a COMBINE of layer 4 at 0, 2 and 8 ms: rank 2 is charged with
8 - (0 + 2 + 8) / 3 = 4.67 ms of layer 4's experts.

Legend: W ranks of the group, C collectives of a step, L layers + 1 (the first row is outside of the
layers), P phases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.profiling.cost_model import CostCurve
from engine.profiling.phase_clock import Phase, Spans
from engine.profiling.wait_attribution import charge

_BATCH = 16
# Steps that charge nobody: kernels and connections are made in them.
_WARM_UP = 2
_NUM_PHASES = len(Phase)
# Lost time of a step by size: bucket b holds [2^b, 2^(b+1)) microseconds.
NUM_BUCKETS = 32


@dataclass(frozen=True, slots=True)
class PhaseTotals:
    """Totals of one rank, each [L, P]: seconds, seconds of them spent waiting for late peers,
    tokens, bytes sent to other ranks, spans.
    """

    seconds: np.ndarray
    waiting: np.ndarray
    tokens: np.ndarray
    num_bytes: np.ndarray
    calls: np.ndarray

    def by_phase(self) -> np.ndarray:
        """float64 [P], seconds."""
        return self.seconds.sum(0)


@dataclass(frozen=True, slots=True)
class Charges:
    """For whom the group waited; but for late_steps and step_seconds the same on every rank of it.

    seconds: float64 [W, L, P], by the phase of the collective at which the rank came late. steps:
    steps with arrivals of all ranks. late_steps: int64 [W], steps in which this rank cost the group
    most, of those that lost a fiftieth of their length. lost, count: [W, NUM_BUCKETS], the rank's
    charge a step by its size: seconds and steps. step_seconds: the length of all those steps, by
    this rank's clock.
    """

    seconds: np.ndarray
    steps: int
    late_steps: np.ndarray
    lost: np.ndarray
    count: np.ndarray
    step_seconds: float


class Collector:
    """Adds up the steps of one run on one rank.

    num_layers: decoder layers of the model. num_ranks: of the lockstep group. peers: this rank's
    tensor group among them; all tensor groups are as large and follow one another.
    """

    def __init__(self, num_layers: int, num_ranks: int, peers: range = range(1)) -> None:
        self._peers = peers
        self._rows = num_layers + 1
        cells = self._rows * _NUM_PHASES
        self._sums = np.zeros((4, cells))  # ns, waiting ns, tokens, bytes
        self._calls = np.zeros(cells, dtype=np.int64)
        self._charge_WLP = np.zeros((num_ranks, cells))
        self._late_W = np.zeros(num_ranks, dtype=np.int64)
        self._lost_WB = np.zeros((num_ranks, NUM_BUCKETS))
        self._count_WB = np.zeros((num_ranks, NUM_BUCKETS), dtype=np.int64)
        self._step_ns = 0
        self._seen = 0
        self._steps = 0
        self._pending: list[tuple[Spans, np.ndarray | None]] = []
        self.experts = CostCurve()
        self.attention = CostCurve()

    def add(self, spans: Spans, arrivals_WC: np.ndarray | None) -> None:
        """Count a step. arrivals_WC: int64 [W, C] as in `waiting.py`, None where unknown."""
        self._pending.append((spans, arrivals_WC))
        if len(self._pending) == _BATCH:
            self._flush()

    def totals(self) -> PhaseTotals:
        """What was added so far."""
        self._flush()
        seconds, waiting, tokens, num_bytes = self._sums.reshape(4, self._rows, _NUM_PHASES)
        return PhaseTotals(
            seconds * 1e-9,
            waiting * 1e-9,
            tokens.astype(np.int64),
            num_bytes.astype(np.int64),
            self._calls.reshape(self._rows, _NUM_PHASES).copy(),
        )

    def charges(self) -> Charges:
        """For whom the group waited so far."""
        self._flush()
        shape = (len(self._late_W), self._rows, _NUM_PHASES)
        return Charges(
            seconds=(self._charge_WLP * 1e-9).reshape(shape),
            steps=self._steps,
            late_steps=self._late_W.copy(),
            lost=self._lost_WB * 1e-9,
            count=self._count_WB.copy(),
            step_seconds=self._step_ns * 1e-9,
        )

    def _flush(self) -> None:
        if not self._pending:
            return
        steps = [spans for spans, _ in self._pending]
        phases = np.concatenate([spans.phases for spans in steps])
        cell = np.concatenate([spans.layers for spans in steps]) + 1
        cell = cell * _NUM_PHASES + phases
        starts = np.concatenate([spans.starts for spans in steps])
        durations = np.concatenate([spans.ends for spans in steps]) - starts
        tokens = np.concatenate([spans.tokens for spans in steps])
        num_bytes = np.concatenate([spans.num_bytes for spans in steps])
        collectives = np.concatenate([spans.collectives for spans in steps])
        step = np.repeat(np.arange(len(steps)), [len(spans.phases) for spans in steps])
        waits = np.zeros_like(starts)
        # Steps with as many collectives as each other are worked on together.
        sizes = np.array(
            [-1 if arrivals is None else arrivals.shape[1] for _, arrivals in self._pending]
        )
        for size in np.unique(sizes[sizes > 0]):
            chosen = np.flatnonzero(sizes == size)
            place = np.full(len(steps), -1)
            place[chosen] = np.arange(len(chosen))
            of_spans = np.flatnonzero(
                (place[step] >= 0) & (collectives >= 0) & (collectives < size)
            )
            at = place[step[of_spans]], collectives[of_spans]
            known = [arrivals for _, arrivals in self._pending if arrivals is not None]
            arrivals_SWC = np.stack([each for each in known if each.shape[1] == size])
            last = arrivals_SWC.max(1)[at]
            if len(self._peers) > 1:
                of_peers = arrivals_SWC[:, self._peers.start : self._peers.stop].max(1)[at]
                last = np.where(phases[of_spans] == Phase.TENSOR, of_peers, last)
            late = last - starts[of_spans]
            waits[of_spans] = late.clip(0, durations[of_spans])
            if arrivals_SWC.shape[1] > 1:
                cell_SC = np.zeros((len(chosen), size), dtype=np.int64)
                cell_SC[at] = cell[of_spans]
                lengths = np.array([steps[i].ends[-1] - steps[i].starts[0] for i in chosen])
                # Of the whole run, the first steps charge nobody.
                counts = self._seen + chosen >= _WARM_UP
                self._charge(arrivals_SWC[counts], cell_SC[counts], lengths[counts])
        self._seen += len(steps)
        cells = len(self._calls)
        for row, values in zip(self._sums, (durations, waits, tokens, num_bytes), strict=True):
            row += np.bincount(cell, weights=values, minlength=cells)
        self._calls += np.bincount(cell, minlength=cells)
        for curve, phase in ((self.experts, Phase.EXPERTS), (self.attention, Phase.ATTENTION)):
            of_phase = np.flatnonzero((phases == phase) & (tokens > 0))
            curve.add(tokens[of_phase], durations[of_phase])
        self._pending.clear()

    def _charge(self, arrivals_SWC: np.ndarray, cell_SC: np.ndarray, length_S: np.ndarray) -> None:
        """Charge the last rank of every collective of S steps of so many nanoseconds."""
        num_steps, num_ranks, _ = arrivals_SWC.shape
        cells = len(self._calls)
        tensor_SC = cell_SC % _NUM_PHASES == Phase.TENSOR
        last_SC, lost_SC, column_C = charge(arrivals_SWC, tensor_SC, len(self._peers))
        cell_SC = cell_SC[:, column_C]
        self._charge_WLP += np.bincount(
            (last_SC * cells + cell_SC).ravel(),
            weights=lost_SC.ravel(),
            minlength=num_ranks * cells,
        ).reshape(num_ranks, cells)
        step_S1 = np.arange(num_steps)[:, None]
        lost_SW = np.bincount(
            (step_S1 * num_ranks + last_SC).ravel(),
            weights=lost_SC.ravel(),
            minlength=num_steps * num_ranks,
        ).reshape(num_steps, num_ranks)
        self._step_ns += int(length_S.sum())
        self._steps += num_steps
        late_S = lost_SW.max(1, initial=0) * 50 > length_S
        worst_S = lost_SW.argmax(1) if num_steps else late_S.astype(np.int64)
        self._late_W += np.bincount(worst_S[late_S], minlength=num_ranks)
        bucket_SW = np.log2(np.maximum(lost_SW, 1000.0) * 1e-3).astype(np.int64)
        bucket_SW = bucket_SW.clip(0, NUM_BUCKETS - 1) + np.arange(num_ranks) * NUM_BUCKETS
        bins = num_ranks * NUM_BUCKETS
        lost_B = np.bincount(bucket_SW.ravel(), weights=lost_SW.ravel(), minlength=bins)
        self._lost_WB += lost_B.reshape(num_ranks, NUM_BUCKETS)
        count_B = np.bincount(bucket_SW.ravel(), minlength=bins)
        self._count_WB += count_B.reshape(num_ranks, NUM_BUCKETS)
