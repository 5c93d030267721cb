"""Phase clock: where each rank's time goes, always on, a few hundred nanoseconds a mark.

A step is cut into spans by marks: `clock.enter(phase)` ends the span before it. A span that waits
for a collective is begun with `clock.meet(phase)` instead. The rank's *arrival* at the collective
is where it started it: the same moment, or an earlier one that `clock.arrive()` has noted, where
other work was done in between. `waiting.py` compares arrivals across ranks.

On CUDA a mark records an event on the current stream and nothing is read before the next step asks
for it, so the clock never synchronises the device in the middle of a step.

The last mark is also what the watchdog publishes: see `Position`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch


class Phase(IntEnum):
    """What a rank is doing. The values index `Spans.seconds_by_phase`."""

    OTHER = 0
    ATTENTION = 1
    GATE = 2
    CONSENSUS = 3
    PLAN = 4
    DISPATCH = 5
    EXPERTS = 6
    COMBINE = 7
    CONTROL = 8


COLLECTIVE_PHASES = (Phase.CONSENSUS, Phase.DISPATCH, Phase.COMBINE, Phase.CONTROL)
NO_LAYER = -1
_NONE = -1


@dataclass(frozen=True, slots=True)
class Position:
    """How far a rank has come: what survivors of a fault are told about it.

    step: steps it has closed. collective: collectives it has started since the engine was built.
    layer: NO_LAYER outside the layers.
    """

    step: int
    layer: int
    phase: Phase
    collective: int


@dataclass(frozen=True, slots=True)
class Spans:
    """The spans of one step on one rank, in order, each touching the next.

    phases, layers, tokens, num_bytes: int64 [n]; layers are NO_LAYER outside the layers; tokens are
    what the span worked on (rows, in DISPATCH, EXPERTS and COMBINE), num_bytes what it sent to
    other ranks. collectives: int64 [n], which of the step's collectives the span waited for, -1 for
    none. starts, ends: int64 [n], nanoseconds of this rank's monotonic clock. arrivals: int64 [C],
    when this rank started each collective of the step; as many on every rank of the group.
    """

    phases: np.ndarray
    layers: np.ndarray
    tokens: np.ndarray
    num_bytes: np.ndarray
    collectives: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    arrivals: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        """float64 [n], the length of every span."""
        return (self.ends - self.starts) * 1e-9

    def seconds_by_phase(self) -> np.ndarray:
        """float64 [len(Phase)], seconds in each phase."""
        return np.bincount(self.phases, weights=self.seconds, minlength=len(Phase))


# phase, layer, tokens, collective
_Mark = tuple[int, int, int, int]
# span, bytes
_Sent = tuple[int, int]


def _spans(
    columns: np.ndarray, sent: list[_Sent], stamps: np.ndarray, arrivals: np.ndarray
) -> Spans:
    """columns: int64 [4, n], the marks of n spans. stamps: int64 [n + 1]."""
    phases, layers, tokens, collectives = columns
    num_bytes = np.zeros(len(phases), dtype=np.int64)
    for span, amount in sent:
        num_bytes[span] += amount
    return Spans(phases, layers, tokens, num_bytes, collectives, stamps[:-1], stamps[1:], arrivals)


class PhaseClock(Protocol):
    """One rank's clock."""

    def enter(self, phase: Phase, layer: int = NO_LAYER, tokens: int = 0) -> None:
        """End the current span and start one of `phase`, which works on so many tokens."""
        ...

    def arrive(self) -> int:
        """Note that a collective is being started, to be waited for later; return its number."""
        ...

    def meet(
        self,
        phase: Phase,
        layer: int = NO_LAYER,
        tokens: int = 0,
        collective: int | None = None,
    ) -> None:
        """End the current span and start one that waits for a collective: the one whose number is
        given, otherwise one that is being started now.
        """
        ...

    def sent(self, num_bytes: int) -> None:
        """Count bytes sent to other ranks to the current span."""
        ...

    def close_step(self) -> None:
        """End the step's last span; later marks belong to the next step."""
        ...

    def read(self) -> Spans | None:
        """Return the spans of the oldest closed step that were not read yet, None when there is
        none.
        """
        ...

    def position(self) -> Position:
        """How far this rank has come; may be asked for by another thread."""
        ...


class NoClock:
    """A clock that keeps nothing but its position (`profiler.enabled: false`)."""

    def __init__(self) -> None:
        self._steps = 0
        self._collectives = 0
        self._last: _Mark = (Phase.OTHER, NO_LAYER, 0, _NONE)

    def enter(self, phase: Phase, layer: int = NO_LAYER, tokens: int = 0) -> None:
        """Remember where this rank is."""
        self._last = (phase, layer, tokens, _NONE)

    def arrive(self) -> int:
        """Count a collective."""
        self._collectives += 1
        return _NONE

    def meet(
        self,
        phase: Phase,
        layer: int = NO_LAYER,
        tokens: int = 0,
        collective: int | None = None,
    ) -> None:
        """Remember where this rank is; count the collective if it starts here."""
        if collective is None:
            self._collectives += 1
        self._last = (phase, layer, tokens, _NONE)

    def sent(self, num_bytes: int) -> None:
        """Do nothing."""

    def close_step(self) -> None:
        """Count the step."""
        self._steps += 1

    def read(self) -> Spans | None:
        """There is never anything to read."""
        return None

    def position(self) -> Position:
        """How far this rank has come."""
        phase, layer, *_ = self._last
        return Position(self._steps, layer, Phase(phase), self._collectives)


class HostClock:
    """Phase clock for devices that compute synchronously: CLOCK_MONOTONIC stamps."""

    def __init__(self) -> None:
        self._marks: list[tuple[int, int, int, int, int]] = []  # _Mark and its stamp
        self._sent: list[_Sent] = []
        self._arrivals: list[int] = []
        self._closed: list[Spans] = []
        self._steps = 0
        self._collectives = 0  # of closed steps

    def enter(self, phase: Phase, layer: int = NO_LAYER, tokens: int = 0) -> None:
        """End the current span and start one of `phase`, which works on so many tokens."""
        self._marks.append((phase, layer, tokens, _NONE, time.monotonic_ns()))

    def arrive(self) -> int:
        """Note that a collective is being started, to be waited for later; return its number."""
        self._arrivals.append(time.monotonic_ns())
        return len(self._arrivals) - 1

    def meet(
        self,
        phase: Phase,
        layer: int = NO_LAYER,
        tokens: int = 0,
        collective: int | None = None,
    ) -> None:
        """End the current span and start one that waits for a collective: the one whose number is
        given, otherwise one that is being started now.
        """
        now = time.monotonic_ns()
        if collective is None:
            collective = len(self._arrivals)
            self._arrivals.append(now)
        self._marks.append((phase, layer, tokens, collective, now))

    def sent(self, num_bytes: int) -> None:
        """Count bytes sent to other ranks to the current span."""
        if self._marks:
            self._sent.append((len(self._marks) - 1, num_bytes))

    def close_step(self) -> None:
        """End the step's last span; later marks belong to the next step."""
        if not self._marks:
            return
        end = (Phase.OTHER, NO_LAYER, 0, _NONE, time.monotonic_ns())
        table = np.array([*self._marks, end], dtype=np.int64).T
        arrivals = np.array(self._arrivals, dtype=np.int64)
        self._closed.append(_spans(table[:4, :-1], self._sent, table[4], arrivals))
        self._steps += 1
        self._collectives += len(self._arrivals)
        self._marks, self._sent, self._arrivals = [], [], []

    def read(self) -> Spans | None:
        """Return the spans of the oldest closed step that were not read yet, None when there is
        none.
        """
        return self._closed.pop(0) if self._closed else None

    def position(self) -> Position:
        """How far this rank has come; may be asked for by another thread."""
        marks, begun = self._marks, self._collectives + len(self._arrivals)
        phase, layer = marks[-1][:2] if marks else (Phase.OTHER, NO_LAYER)
        return Position(self._steps, layer, Phase(phase), begun)


class CudaClock:
    """Phase clock for CUDA: events on the current stream, read once they have passed.

    Event times are turned into nanoseconds of the host's monotonic clock through a base event, so
    ranks on one host compare directly. The first base is synchronised when the clock is made. From
    then on the last event of a step that was read is the base of the next: the time between two
    events is a float32 of milliseconds, which tells microseconds apart over seconds and no longer
    over an hour.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: list[torch.cuda.Event] = []
        self._marks: list[_Mark] = []
        self._sent: list[_Sent] = []
        self._events: list[torch.cuda.Event] = []
        self._arrivals: list[torch.cuda.Event] = []
        self._closed: list[
            tuple[list[_Mark], list[_Sent], list[torch.cuda.Event], list[torch.cuda.Event]]
        ] = []
        self._steps = 0
        self._collectives = 0
        self._last: _Mark = (Phase.OTHER, NO_LAYER, 0, _NONE)
        self._base = torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            self._base.record()
        # SYNC: once, when the engine is built, to tie device time to host time.
        self._base.synchronize()
        self._base_ns = time.monotonic_ns()

    def enter(self, phase: Phase, layer: int = NO_LAYER, tokens: int = 0) -> None:
        """End the current span and start one of `phase`, which works on so many tokens."""
        self._last = mark = (phase, layer, tokens, _NONE)
        self._marks.append(mark)
        self._events.append(self._record())

    def arrive(self) -> int:
        """Note that a collective is being started, to be waited for later; return its number."""
        self._collectives += 1
        self._arrivals.append(self._record())
        return len(self._arrivals) - 1

    def meet(
        self,
        phase: Phase,
        layer: int = NO_LAYER,
        tokens: int = 0,
        collective: int | None = None,
    ) -> None:
        """End the current span and start one that waits for a collective: the one whose number is
        given, otherwise one that is being started now.
        """
        event = self._record()
        if collective is None:
            self._collectives += 1
            collective = len(self._arrivals)
            self._arrivals.append(event)
        self._last = mark = (phase, layer, tokens, collective)
        self._marks.append(mark)
        self._events.append(event)

    def sent(self, num_bytes: int) -> None:
        """Count bytes sent to other ranks to the current span."""
        if self._marks:
            self._sent.append((len(self._marks) - 1, num_bytes))

    def close_step(self) -> None:
        """End the step's last span; later marks belong to the next step."""
        if not self._marks:
            return
        self._steps += 1
        self._events.append(self._record())
        self._closed.append((self._marks, self._sent, self._events, self._arrivals))
        self._marks, self._sent, self._events, self._arrivals = [], [], [], []

    def read(self) -> Spans | None:
        """Return the spans of the oldest closed step that were not read yet, None when there is
        none.
        """
        if not self._closed:
            return None
        marks, sent, events, arrivals = self._closed.pop(0)
        # SYNC: the host has read this step's tokens, so its last event has passed or is about to.
        # Polling instead would let ranks drift apart by a step, and stamps of different steps
        # cannot be compared.
        events[-1].synchronize()
        columns = np.array(marks, dtype=np.int64).T
        spans = _spans(columns, sent, self._nanoseconds(events), self._nanoseconds(arrivals))
        # An arrival may be the event of a span too; each goes back into the pool once.
        free = {id(event): event for event in (self._base, *events, *arrivals)}
        self._base, self._base_ns = free.pop(id(events[-1])), int(spans.ends[-1])
        self._pool.extend(free.values())
        return spans

    def position(self) -> Position:
        """How far this rank's host has come; may be asked for by another thread."""
        phase, layer, *_ = self._last
        return Position(self._steps, layer, Phase(phase), self._collectives)

    def _nanoseconds(self, events: list[torch.cuda.Event]) -> np.ndarray:
        stamps = np.array([self._base.elapsed_time(event) for event in events])
        return (stamps * 1e6).astype(np.int64) + self._base_ns

    def _record(self) -> torch.cuda.Event:
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def make_clock(device: torch.device, enabled: bool = True) -> PhaseClock:
    """Return the clock that fits the device."""
    if not enabled:
        return NoClock()
    return CudaClock(device) if device.type == "cuda" else HostClock()
