"""Phase clocks: of the host, for devices that compute synchronously, and of CUDA.

On CUDA a mark records an event on the current stream. A step is read once the next one is queued
behind it, so measuring never leaves the device without work. `phase_clock.py` has the interface.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import torch

from engine.profiling.phase_clock import (
    NO_LAYER,
    NONE,
    Mark,
    Phase,
    PhaseClock,
    Sent,
    Spans,
    spans_of,
)

_Stamp = TypeVar("_Stamp")


class NoClock(PhaseClock):
    """Keeps its position and nothing else (`profiler.enabled: false`)."""


class _StampClock(PhaseClock, ABC, Generic[_Stamp]):
    """Marks of the current step and of closed steps that were not read yet, each with a stamp of
    the device's kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marks: list[Mark] = []
        self._stamps: list[_Stamp] = []
        self._sent: list[Sent] = []
        self._arrivals: list[_Stamp | None] = []  # None: skipped
        self._closed: list[tuple[list[Mark], list[_Stamp], list[Sent], list[_Stamp | None]]] = []

    @abstractmethod
    def _stamp(self) -> _Stamp:
        """Return a stamp of this moment, of the host or of the current stream."""

    def enter(self, phase: Phase, layer: int = NO_LAYER, tokens: int = 0) -> None:
        """End the current span and start one of `phase` that processes `tokens`."""
        self._mark((phase, layer, tokens, NONE), self._stamp())

    def record_arrival(self) -> int:
        """Note that this rank starts a collective and waits for it later; return its number."""
        self._collectives += 1
        self._arrivals.append(self._stamp())
        return len(self._arrivals) - 1

    def enter_collective(
        self, phase: Phase, layer: int = NO_LAYER, tokens: int = 0, collective: int | None = None
    ) -> None:
        """End the current span and start one that waits for a collective; as in `PhaseClock`."""
        stamp = self._stamp()
        if collective is None:
            self._collectives += 1
            collective = len(self._arrivals)
            self._arrivals.append(stamp)
        self._mark((phase, layer, tokens, collective), stamp)

    def skip_collective(self, phase: Phase, layer: int = NO_LAYER) -> None:
        """Enter a collective that this rank leaves out; as in `PhaseClock`."""
        self._collectives += 1
        self._mark((phase, layer, 0, len(self._arrivals)), self._stamp())
        self._arrivals.append(None)

    def sent(self, num_bytes: int) -> None:
        """Count bytes that the current span sends to other ranks."""
        if self._marks:
            self._sent.append((len(self._marks) - 1, num_bytes))

    def close_step(self) -> None:
        """End the step's last span; later marks belong to the next step."""
        if not self._marks:
            return
        self._steps += 1
        self._stamps.append(self._stamp())
        self._closed.append((self._marks, self._stamps, self._sent, self._arrivals))
        self._marks, self._stamps, self._sent, self._arrivals = [], [], [], []

    def _mark(self, mark: Mark, stamp: _Stamp) -> None:
        self._last = mark
        self._marks.append(mark)
        self._stamps.append(stamp)


class HostClock(_StampClock[int]):
    """Phase clock for devices that compute synchronously: CLOCK_MONOTONIC stamps."""

    def _stamp(self) -> int:
        return time.monotonic_ns()

    def read(self, *, ended: bool = False) -> Spans | None:
        """Return the spans of the oldest closed step that was not read yet, or None."""
        if not self._closed:
            return None
        marks, stamps, sent, arrivals = self._closed.pop(0)
        columns = np.array(marks, dtype=np.int64).T
        started = [NONE if stamp is None else stamp for stamp in arrivals]
        return spans_of(columns, sent, np.array(stamps), np.array(started, dtype=np.int64))


class CudaClock(_StampClock[torch.cuda.Event]):
    """Phase clock for CUDA: events on the current stream, read one step later.

    A step is read once the next one is closed too: the host may run ahead of the device by a step,
    so work is queued behind what it reads and the device is never idle.

    Event times become nanoseconds of the host's monotonic clock through a base event, so ranks on
    one host compare directly. The first base is synchronised when the clock is made. Later the last
    event of each step read is the base of the next step: the time between two events is a float32
    of milliseconds, which resolves microseconds over seconds but not over an hour.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._pool: list[torch.cuda.Event] = []
        self._base = torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            self._base.record()
        # SYNC: once, when the engine is built, to tie device time to host time.
        self._base.synchronize()
        self._base_ns = time.monotonic_ns()

    def read(self, *, ended: bool = False) -> Spans | None:
        """Return the spans of the oldest closed step that was not read yet.

        None where there is none, or, unless `ended`, where no later step is closed.
        """
        if len(self._closed) < (1 if ended else 2):
            return None
        marks, events, sent, arrivals = self._closed.pop(0)
        # SYNC: of a step with another one queued behind it; already completed, unless neither of
        # the two sampled. Polling instead would let ranks drift apart by a step, and stamps of
        # different steps cannot be compared.
        events[-1].synchronize()
        columns = np.array(marks, dtype=np.int64).T
        spans = spans_of(columns, sent, self._nanoseconds(events), self._nanoseconds(arrivals))
        # An arrival may also be the event of a span; each event returns to the pool once.
        free = {id(each): each for each in (self._base, *events, *arrivals) if each is not None}
        self._base, self._base_ns = free.pop(id(events[-1])), int(spans.ends[-1])
        self._pool.extend(free.values())
        return spans

    def _nanoseconds(self, events: Sequence[torch.cuda.Event | None]) -> np.ndarray:
        base, base_ns = self._base, self._base_ns
        stamps = [
            NONE if event is None else base_ns + int(base.elapsed_time(event) * 1e6)
            for event in events
        ]
        return np.array(stamps, dtype=np.int64)

    def _stamp(self) -> torch.cuda.Event:
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def make_clock(device: torch.device, enabled: bool = True) -> PhaseClock:
    """Return the clock for a device; a `NoClock` if not enabled."""
    if not enabled:
        return NoClock()
    return CudaClock(device) if device.type == "cuda" else HostClock()
