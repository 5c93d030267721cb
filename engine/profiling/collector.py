"""Collector: adds the spans of every step up to one rank's totals, per layer and per phase.

It takes each step's spans, with all ranks' arrivals where they are known, and sums where this
rank's time, tokens and bytes went, how long it waited (`wait_time.py`), for which rank the group
waited (`wait_attribution.py`), and what its calls cost (`cost_model.py`). The attribution depends
on the exchanged arrivals alone, so every rank of the group has the same numbers; the length of a
step is measured by each rank's own clock.

In a step that is not complete (`phase_clock.py`) waiting, tokens, bytes and calls are exact, and
the seconds of each phase an estimate: what is left of the time between two stamps without the
waiting is split as between the same two in the last complete step. So all seconds still add up to
the length of the steps. Calls of such steps are not in the cost curves.

Steps are processed in batches, which costs microseconds per step.

Worked example, 3 ranks that arrive at a COMBINE of layer 4 at 0, 2 and 8 ms: 8 - (0 + 2 + 8) / 3 =
4.67 ms are attributed to rank 2, in layer 4's combine.

Legend: W ranks of the group, C collectives of a step, L layers + 1 (the first row is outside of the
layers), P phases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.profiling.cost_model import CostCurve
from engine.profiling.phase_clock import WARM_UP, Phase, Spans
from engine.profiling.wait_attribution import attribute_wait

_BATCH = 16
_NUM_PHASES = len(Phase)
# Waits that a rank caused in one step, by size: bucket b holds [2^b, 2^(b+1)) microseconds.
NUM_BUCKETS = 32


@dataclass(frozen=True, slots=True)
class PhaseTotals:
    """Totals of one rank, each [L, P]."""

    seconds: np.ndarray
    waiting: np.ndarray  # of the seconds, those of waiting for stragglers
    tokens: np.ndarray  # processed
    num_bytes: np.ndarray  # sent to other ranks
    calls: np.ndarray  # spans

    def by_phase(self) -> np.ndarray:
        """Return seconds per phase, float64 [P]."""
        return self.seconds.sum(0)


@dataclass(frozen=True, slots=True)
class WaitAttribution:
    """The wait that each rank caused, as seconds of a mean rank.

    Equal on every rank of the group, except straggler_steps and step_seconds.
    """

    seconds: np.ndarray  # float64 [W, L, P], by the phase of the collective that was waited for
    steps: int  # steps in which the arrivals of all ranks are known
    straggler_steps: np.ndarray  # int64 [W], steps in which it caused most; only of large waits
    bucket_seconds: np.ndarray  # float64 [W, NUM_BUCKETS], wait caused per step, by its size
    bucket_steps: np.ndarray  # int64 [W, NUM_BUCKETS], number of those steps
    step_seconds: float  # length of all those steps, by this rank's clock


class _Split:
    """How the last complete step's work was spread over the spans from one stamp to the next.

    The stamps are those of a step that is not complete. A span between two of them is known by its
    cell (layer and phase) and its head, the cell of the span at the first of the two.
    """

    def __init__(self) -> None:
        self._head_N = self._cell_N = np.zeros(0, dtype=np.int64)
        self._work_N = np.zeros(0)

    def move(
        self,
        steps: list[Spans],
        complete_S: np.ndarray,
        step: np.ndarray,
        cell: np.ndarray,
        work: np.ndarray,
        cells: int,
    ) -> np.ndarray:
        """Return what to add to each cell's nanoseconds, float64 [cells]; they sum to 0.

        Args:
            complete_S: bool, which steps are complete.
            step: int64 [n], which of the steps each span is of.
            cell, work: int64 [n], the spans' cells, and nanoseconds without waiting.
        """
        added = np.zeros(cells)
        # A complete step, and those after it which are not: they are split as it was.
        of_S = complete_S.cumsum()
        for number in np.unique(of_S).tolist():
            if (known := np.flatnonzero(complete_S & (of_S == number))).size:
                index = int(known[0])
                chosen = step == index
                self._learn(steps[index], cell[chosen], work[chosen])
            chosen = ((of_S == number) & ~complete_S)[step]
            if chosen.any():
                head_work = np.bincount(cell[chosen], weights=work[chosen], minlength=cells)
                added += self._spread(head_work)
        return added

    def _learn(self, spans: Spans, cell_N: np.ndarray, work_N: np.ndarray) -> None:
        """Take a complete step; keep what is known of heads that it does not have."""
        span_N = np.arange(len(cell_N))
        head_N = cell_N[np.maximum.accumulate(np.where(spans.stamped(), span_N, 0))]
        kept = ~np.isin(self._head_N, head_N)
        self._head_N = np.concatenate((self._head_N[kept], head_N))
        self._cell_N = np.concatenate((self._cell_N[kept], cell_N))
        self._work_N = np.concatenate((self._work_N[kept], work_N))

    def _spread(self, head_work: np.ndarray) -> np.ndarray:
        """Return the change of every cell if the heads' work is spread, float64 [cells]."""
        cells = len(head_work)
        total = np.bincount(self._head_N, weights=self._work_N, minlength=cells)
        moved = np.where(total > 0, head_work, 0.0)
        share_N = self._work_N / np.maximum(total, 1.0)[self._head_N]
        given = np.bincount(self._cell_N, weights=share_N * moved[self._head_N], minlength=cells)
        return given - moved


class Collector:
    """Sums of one run on one rank.

    Args:
        num_layers: decoder layers of the model.
        num_ranks: of the lockstep group.
        tensor_ranks: rank offsets of this rank's tensor group in the lockstep group; all tensor
            groups have the same size and are consecutive ranks.
        every: steps from one complete one to the next.
    """

    def __init__(
        self, num_layers: int, num_ranks: int, tensor_ranks: range = range(1), every: int = 1
    ) -> None:
        self._tensor_ranks = tensor_ranks
        self._split = _Split() if every > 1 else None
        self._rows = num_layers + 1
        cells = self._rows * _NUM_PHASES
        self._sums = np.zeros((4, cells))  # ns, waiting ns, tokens, bytes
        self._calls = np.zeros(cells, dtype=np.int64)
        self._wait_WLP = np.zeros((num_ranks, cells))
        self._straggler_steps_W = np.zeros(num_ranks, dtype=np.int64)
        self._bucket_ns_WB = np.zeros((num_ranks, NUM_BUCKETS))
        self._bucket_steps_WB = np.zeros((num_ranks, NUM_BUCKETS), dtype=np.int64)
        self._step_ns = 0
        self._num_added = 0
        self._steps = 0
        self._pending: list[tuple[Spans, np.ndarray | None]] = []
        self.experts = CostCurve()  # of its experts' calls
        self.attention = CostCurve()  # of its attention's calls

    def add(self, spans: Spans, arrivals_WC: np.ndarray | None) -> None:
        """Add a step. arrivals_WC: int64 [W, C] as in `wait_time.py`, None where unknown."""
        self._pending.append((spans, arrivals_WC))
        if len(self._pending) == _BATCH:
            self._flush()

    def totals(self) -> PhaseTotals:
        """Return the sums so far."""
        self._flush()
        seconds, waiting, tokens, num_bytes = self._sums.reshape(4, self._rows, _NUM_PHASES)
        return PhaseTotals(
            seconds * 1e-9,
            waiting * 1e-9,
            tokens.astype(np.int64),
            num_bytes.astype(np.int64),
            self._calls.reshape(self._rows, _NUM_PHASES).copy(),
        )

    def wait_attribution(self) -> WaitAttribution:
        """Return the wait that each rank has caused so far."""
        self._flush()
        shape = (len(self._straggler_steps_W), self._rows, _NUM_PHASES)
        return WaitAttribution(
            seconds=(self._wait_WLP * 1e-9).reshape(shape),
            steps=self._steps,
            straggler_steps=self._straggler_steps_W.copy(),
            bucket_seconds=self._bucket_ns_WB * 1e-9,
            bucket_steps=self._bucket_steps_WB.copy(),
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
        # Steps with the same number of collectives are processed together.
        sizes = np.array(
            [-1 if arrivals is None else arrivals.shape[1] for _, arrivals in self._pending]
        )
        for size in np.unique(sizes[sizes > 0]):
            chosen = np.flatnonzero(sizes == size)
            row = np.full(len(steps), -1)
            row[chosen] = np.arange(len(chosen))
            of_spans = np.flatnonzero((row[step] >= 0) & (collectives >= 0) & (collectives < size))
            at = row[step[of_spans]], collectives[of_spans]
            known = [arrivals for _, arrivals in self._pending if arrivals is not None]
            arrivals_SWC = np.stack([each for each in known if each.shape[1] == size])
            last = arrivals_SWC.max(1)[at]
            if len(self._tensor_ranks) > 1:
                last_in_group = arrivals_SWC[:, list(self._tensor_ranks)].max(1)[at]
                last = np.where(phases[of_spans] == Phase.TENSOR, last_in_group, last)
            waits[of_spans] = (last - starts[of_spans]).clip(0, durations[of_spans])
            if arrivals_SWC.shape[1] > 1:
                cell_SC = np.zeros((len(chosen), size), dtype=np.int64)
                cell_SC[at] = cell[of_spans]
                lengths = np.array([steps[i].ends[-1] - steps[i].starts[0] for i in chosen])
                counts = self._num_added + chosen >= WARM_UP
                self._attribute(arrivals_SWC[counts], cell_SC[counts], lengths[counts])
        cells = len(self._calls)
        for sums, values in zip(self._sums, (durations, waits, tokens, num_bytes), strict=True):
            sums += np.bincount(cell, weights=values, minlength=cells)
        self._calls += np.bincount(cell, minlength=cells)
        is_call = tokens > 0
        if self._split is not None:
            complete_S = np.array([spans.complete for spans in steps])
            work = durations - waits
            self._sums[0] += self._split.move(steps, complete_S, step, cell, work, cells)
            # Few steps count, so those that compile kernels would weigh too much.
            complete_S &= self._num_added + np.arange(len(steps)) >= WARM_UP
            is_call &= complete_S[step]
        for curve, phase in ((self.experts, Phase.EXPERTS), (self.attention, Phase.ATTENTION)):
            of_phase = np.flatnonzero((phases == phase) & is_call)
            curve.add(tokens[of_phase], durations[of_phase])
        self._num_added += len(steps)
        self._pending.clear()

    def _attribute(
        self, arrivals_SWC: np.ndarray, cell_SC: np.ndarray, length_S: np.ndarray
    ) -> None:
        """Attribute the waits of S steps.

        cell_SC: layer and phase of each collective. length_S: nanoseconds of each step.
        """
        num_steps, num_ranks, _ = arrivals_SWC.shape
        cells = len(self._calls)
        tensor_SC = cell_SC % _NUM_PHASES == Phase.TENSOR
        last_SC, wait_SC, column_C = attribute_wait(
            arrivals_SWC, tensor_SC, len(self._tensor_ranks)
        )
        cell_SC = cell_SC[:, column_C]
        self._wait_WLP += np.bincount(
            (last_SC * cells + cell_SC).ravel(),
            weights=wait_SC.ravel(),
            minlength=num_ranks * cells,
        ).reshape(num_ranks, cells)
        step_S1 = np.arange(num_steps)[:, None]
        wait_SW = np.bincount(
            (step_S1 * num_ranks + last_SC).ravel(),
            weights=wait_SC.ravel(),
            minlength=num_steps * num_ranks,
        ).reshape(num_steps, num_ranks)
        self._step_ns += int(length_S.sum())
        self._steps += num_steps
        # A step without noticeable waits, a fiftieth of its length, has no straggler.
        counts_S = wait_SW.max(1, initial=0) * 50 > length_S
        worst_S = wait_SW.argmax(1) if num_steps else counts_S.astype(np.int64)
        self._straggler_steps_W += np.bincount(worst_S[counts_S], minlength=num_ranks)
        bucket_SW = np.log2(np.maximum(wait_SW, 1000.0) * 1e-3).astype(np.int64)
        bucket_SW = bucket_SW.clip(0, NUM_BUCKETS - 1) + np.arange(num_ranks) * NUM_BUCKETS
        bins = num_ranks * NUM_BUCKETS
        seconds_B = np.bincount(bucket_SW.ravel(), weights=wait_SW.ravel(), minlength=bins)
        self._bucket_ns_WB += seconds_B.reshape(num_ranks, NUM_BUCKETS)
        steps_B = np.bincount(bucket_SW.ravel(), minlength=bins)
        self._bucket_steps_WB += steps_B.reshape(num_ranks, NUM_BUCKETS)
