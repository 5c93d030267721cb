"""Tuner: how many chunks to cut a step into, measured while the job runs (`moe.overlap.chunks:
auto`).

Steps are told apart by size, in buckets of powers of two of their tokens over all ranks. In the
first steps of a bucket the layers of a model take turns with the candidates, each rank measures its
own time from dispatch to combine, then the ranks add their times up and keep what was fastest: one
chunk unless another is at least 2% faster. The sum is one small all-reduce a bucket on the
host-side group.

All ranks must cut alike, so nothing here looks at a time before it is agreed: whose turn it is and
when ranks agree follows from the tokens of the steps so far, which all of them know. Ranks agree at
the first layer's call of a later step, when the times have long been there.

Worked example, 2 layers, candidates 1 2 4: ceil(3 / 2) = 2 visits warm up, then 3 cycles of 3
visits give 6 times a candidate. Layer 0 takes 1 2 | 1 2 4 1 2 4 1 2 4 and layer 1 takes 2 4 | 2 4 1
2 4 1 2 4 1, so that every layer has tried every candidate as often; they agree at visit 12.

Legend: L layers, n candidates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

CANDIDATES = (1, 2, 4)
# Times a candidate, at least.
SAMPLES = 6
# Of the serial time, in percent: what a number of chunks must not exceed to be chosen.
MUST_REACH = 98


class Timer(Protocol):
    """A time that has begun."""

    def stop(self) -> None:
        """End it."""
        ...

    def seconds(self) -> float:
        """How long it took; may wait until that is known."""
        ...


class HostTimer:
    """A lap of a device that computes synchronously."""

    def __init__(self) -> None:
        self._begin = self._end = time.monotonic_ns()

    def stop(self) -> None:
        """End it."""
        self._end = time.monotonic_ns()

    def seconds(self) -> float:
        """How long it took."""
        return (self._end - self._begin) * 1e-9


class CudaEventTimer:
    """A lap between two events of the current stream."""

    def __init__(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._begin.record()

    def stop(self) -> None:
        """End it."""
        self._end.record()

    def seconds(self) -> float:
        """How long it took."""
        # SYNC: a few times a bucket, a step or more after the event was recorded.
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e-3


class Trial:
    """One layer call's number of chunks, None where the tuner has no say. Dispatch to combine run
    inside `with turn:`, which measures them where they are wanted.
    """

    def __init__(
        self,
        chunks: int | None = None,
        keep: Callable[[Timer], None] | None = None,
        new_lap: type[Timer] = HostTimer,
    ) -> None:
        """keep: takes the lap; None: nothing is measured."""
        self.chunks = chunks
        self._keep, self._new_lap = keep, new_lap
        self._lap: Timer | None = None

    def __enter__(self) -> None:
        if self._keep is not None:
            self._lap = self._new_lap()

    def __exit__(self, kind: object, *_: object) -> None:
        if self._lap is not None and self._keep is not None and kind is None:
            self._lap.stop()
            self._keep(self._lap)


@dataclass(slots=True)
class _Bucket:
    """One bucket. laps: of each candidate, with the step's tokens. visits: of each layer."""

    candidates: tuple[int, ...]
    laps: list[list[tuple[int, Timer]]]
    visits: dict[int, int] = field(default_factory=dict)
    chosen: int | None = None


class ChunkTuner:
    """Chooses for all layers of a model. Build it alike on every rank."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._layers: list[int] = []
        self._trials: dict[int, _Bucket] = {}
        cuda = device is not None and device.type == "cuda"
        self._new_lap: type[Timer] = CudaEventTimer if cuda else HostTimer

    @property
    def choices(self) -> dict[int, int]:
        """The agreed number of chunks by bucket: {b: chunks} for steps of 2^b tokens and more."""
        trials = sorted(self._trials.items())
        return {bucket: trial.chosen for bucket, trial in trials if trial.chosen is not None}

    def register(self, layer: int) -> None:
        """A layer that will ask. All join before the first asks."""
        self._layers.append(layer)

    def reset(self) -> None:
        """Begin anew, between steps and alike on every rank: costs have changed."""
        self._trials.clear()

    def due(self, layer: int, group_tokens: int) -> list[int] | None:
        """This rank's costs of a bucket's candidates, where the ranks must now add them up and call
        `settle`; None otherwise. The same on every rank.

        layer: that is about to be called. group_tokens: of the step, over all ranks. Costs are in
        femtoseconds a token: the median of a candidate's laps.
        """
        trial = self._trials.get(bucket_of(group_tokens))
        if trial is None or trial.chosen is not None or layer != self._layers[0]:
            return None
        if trial.visits[layer] < self._last_visit(trial):
            return None
        return [
            round(1e15 * statistics.median(lap.seconds() / tokens for tokens, lap in laps))
            for laps in trial.laps
        ]

    def choose(self, group_tokens: int, totals: Sequence[int]) -> None:
        """Choose by the sums of all ranks' costs, in the order of the candidates."""
        trial = self._trials[bucket_of(group_tokens)]
        best = min(range(len(totals)), key=totals.__getitem__)
        wins = 100 * totals[best] <= MUST_REACH * totals[0]
        trial.chosen = trial.candidates[best] if wins else trial.candidates[0]
        trial.laps = []

    def begin_trial(
        self, layer: int, group_tokens: int, candidates: Callable[[int], Sequence[int]]
    ) -> Trial:
        """The number of chunks of one call.

        candidates: from the least tokens of a bucket to what may be tried there, beginning with 1.
        """
        bucket = bucket_of(group_tokens)
        trial = self._trials.get(bucket)
        if trial is None:
            tried = tuple(candidates(1 << bucket))
            trial = self._trials[bucket] = _Bucket(tried, [[] for _ in tried])
            if len(tried) == 1:
                trial.chosen = tried[0]
        if trial.chosen is not None:
            return Trial(trial.chosen)
        visit = trial.visits.get(layer, 0)
        trial.visits[layer] = visit + 1
        warm_up = self._warm_up(trial)
        number = len(trial.candidates)
        shift = visit if visit < warm_up else visit - warm_up
        index = (shift + self._layers.index(layer)) % number
        if visit < warm_up:
            return Trial(trial.candidates[index])
        laps = trial.laps[index]
        return Trial(
            trial.candidates[index], lambda lap: laps.append((group_tokens, lap)), self._new_lap
        )

    def _warm_up(self, trial: _Bucket) -> int:
        """Visits of a layer in which buffers may still grow."""
        return -(-len(trial.candidates) // len(self._layers))

    def _last_visit(self, trial: _Bucket) -> int:
        """Visits of a layer after which there are times enough."""
        cycles = -(-SAMPLES // len(self._layers))
        return self._warm_up(trial) + cycles * len(trial.candidates)


def bucket_of(group_tokens: int) -> int:
    """The bucket of a step: the power of two that its tokens reach, 0 for none."""
    return max(group_tokens, 1).bit_length() - 1
