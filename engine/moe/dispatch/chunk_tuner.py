"""Chunk tuner: how many chunks to cut a step into, measured during the job (`moe.overlap.chunks:
auto`).

Steps are classified by size, in buckets of powers of two of their tokens over all ranks. In the
first steps of a bucket the layers of a model rotate through the candidates, each rank measures its
own time from dispatch to combine, then the ranks add their times and keep the fastest candidate:
one chunk unless another is at least 2% faster. The sum is one small all-reduce per bucket on the
host-side group.

All ranks must cut alike, so no time is used before it is agreed: which candidate is next and when
ranks agree follows from the tokens of the steps so far, which are equal on all of them. Ranks agree
at the first layer's call of a later step, when the times are long complete.

Worked example, 2 layers, candidates 1 2 4: ceil(3 / 2) = 2 visits warm up, then 3 cycles of 3
visits give 6 times per candidate. Layer 0 takes 1 2 | 1 2 4 1 2 4 1 2 4 and layer 1 takes 2 4 |
2 4 1 2 4 1 2 4 1, so that every layer has tried every candidate as often; they agree at visit 12.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

CANDIDATES = (1, 2, 4)
# Times per candidate, at least.
SAMPLES = 6
# Percent of the time with one chunk that a number of chunks must not exceed to be chosen.
MUST_REACH = 98


class Timer(Protocol):
    """Starts when it is made."""

    def stop(self) -> None:
        """Stop the timer."""
        ...

    def seconds(self) -> float:
        """Return the time from start to stop; may wait until it is known."""
        ...


class HostTimer:
    """A timer for a device that computes synchronously."""

    def __init__(self) -> None:
        self._begin = self._end = time.monotonic_ns()

    def stop(self) -> None:
        """Stop the timer."""
        self._end = time.monotonic_ns()

    def seconds(self) -> float:
        """Return the time from start to stop."""
        return (self._end - self._begin) * 1e-9


class CudaEventTimer:
    """A timer between two events on the current stream."""

    def __init__(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._begin.record()

    def stop(self) -> None:
        """Record the second event."""
        self._end.record()

    def seconds(self) -> float:
        """Return the time between the events."""
        # SYNC: a few times per bucket, a step or more after the event was recorded.
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e-3


class Trial:
    """The number of chunks of one layer call. Dispatch to combine run inside `with trial:`, which
    times them where the tuner needs it.
    """

    def __init__(
        self,
        chunks: int | None = None,  # None: as configured
        keep: Callable[[Timer], None] | None = None,  # receives the timer; None: not timed
        new_timer: Callable[[], Timer] = HostTimer,
    ) -> None:
        self.chunks = chunks
        self._keep, self._new_timer = keep, new_timer
        self._timer: Timer | None = None

    def start(self) -> None:
        """Start the timer, where `with` would not do."""
        self.__enter__()

    def stop(self) -> None:
        """Stop the timer and keep it."""
        self.__exit__(None)

    def __enter__(self) -> None:
        if self._keep is not None:
            self._timer = self._new_timer()

    def __exit__(self, kind: object, *_: object) -> None:
        if self._timer is not None and self._keep is not None and kind is None:
            self._timer.stop()
            self._keep(self._timer)


@dataclass(slots=True)
class _Bucket:
    """Steps of about the same size."""

    candidates: tuple[int, ...]
    timers: list[list[tuple[int, Timer]]]  # per candidate, with the step's tokens
    visits: dict[int, int] = field(default_factory=dict)  # per layer
    chosen: int | None = None


class ChunkTuner:
    """Chooses for all layers of a model. Build it alike on every rank."""

    def __init__(
        self, device: torch.device | None = None, new_timer: Callable[[], Timer] | None = None
    ) -> None:
        self._layers: list[int] = []
        self._buckets: dict[int, _Bucket] = {}
        self._of_exchange: ChunkTuner | None = None
        is_cuda = device is not None and device.type == "cuda"
        self._new_timer = new_timer or (CudaEventTimer if is_cuda else HostTimer)

    @property
    def of_exchange(self) -> ChunkTuner:
        """The tuner of the model's way to exchange small steps (`layer_static.py`)."""
        if self._of_exchange is None:
            self._of_exchange = ChunkTuner(new_timer=self._new_timer)
        return self._of_exchange

    @property
    def choices(self) -> dict[int, int]:
        """The agreed number of chunks by bucket: {b: chunks} for steps of 2^b tokens and more."""
        buckets = sorted(self._buckets.items())
        return {number: each.chosen for number, each in buckets if each.chosen is not None}

    def register(self, layer: int) -> None:
        """Add a layer. All layers are registered before the first trial."""
        self._layers.append(layer)

    def reset(self) -> None:
        """Discard all times and choices, between steps and alike on every rank."""
        self._buckets.clear()
        if self._of_exchange is not None:
            self._of_exchange.reset()

    def due(self, layer: int, group_tokens: int) -> list[int] | None:
        """Return this rank's costs of a bucket's candidates where the ranks must now add them and
        call `choose`, else None; which of the two is the same on every rank.

        Costs are in femtoseconds per token: the median of a candidate's times.

        Args:
            layer: about to be called.
            group_tokens: tokens of the step over all ranks.
        """
        bucket = self._buckets.get(bucket_of(group_tokens))
        if bucket is None or bucket.chosen is not None or layer != self._layers[0]:
            return None
        if bucket.visits[layer] < self._last_visit(bucket):
            return None
        return [
            round(1e15 * statistics.median(timer.seconds() / tokens for tokens, timer in timers))
            for timers in bucket.timers
        ]

    def choose(self, group_tokens: int, totals: Sequence[int]) -> None:
        """Choose by the sums of all ranks' costs, in the order of the candidates."""
        bucket = self._buckets[bucket_of(group_tokens)]
        best = min(range(len(totals)), key=totals.__getitem__)
        wins = 100 * totals[best] <= MUST_REACH * totals[0]
        bucket.chosen = bucket.candidates[best] if wins else bucket.candidates[0]
        bucket.timers = []

    def begin_trial(
        self, layer: int, group_tokens: int, candidates: Callable[[int], Sequence[int]]
    ) -> Trial:
        """Return the number of chunks of one call, to be timed until its bucket has a choice.

        candidates: from the least tokens of a bucket to what may be tried there, beginning with 1.
        """
        number = bucket_of(group_tokens)
        bucket = self._buckets.get(number)
        if bucket is None:
            tried = tuple(candidates(1 << number))
            bucket = self._buckets[number] = _Bucket(tried, [[] for _ in tried])
            if len(tried) == 1:
                bucket.chosen = tried[0]
        if bucket.chosen is not None:
            return Trial(bucket.chosen)
        visit = bucket.visits.get(layer, 0)
        bucket.visits[layer] = visit + 1
        warm_up = self._warm_up(bucket)
        shift = visit if visit < warm_up else visit - warm_up
        index = (shift + self._layers.index(layer)) % len(bucket.candidates)
        if visit < warm_up:
            return Trial(bucket.candidates[index])
        timers = bucket.timers[index]
        return Trial(
            bucket.candidates[index],
            lambda timer: timers.append((group_tokens, timer)),
            self._new_timer,
        )

    def _warm_up(self, bucket: _Bucket) -> int:
        """Return the visits per layer in which buffers may still grow."""
        return -(-len(bucket.candidates) // len(self._layers))

    def _last_visit(self, bucket: _Bucket) -> int:
        """Return the visits per layer after which there are enough times."""
        cycles = -(-SAMPLES // len(self._layers))
        return self._warm_up(bucket) + cycles * len(bucket.candidates)


def bucket_of(group_tokens: int) -> int:
    """Return a step's bucket: the exponent of the power of two its tokens reach, 0 for none."""
    return max(group_tokens, 1).bit_length() - 1
