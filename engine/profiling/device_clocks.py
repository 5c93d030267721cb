"""Phase clocks: of the host, for devices that compute synchronously, and of CUDA.

On CUDA a mark records an event on the current stream. A step is read once the next one is queued
behind it, so measuring never leaves the device without work. `phase_clock.py` has the interface.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Generic, TypeVar

import numpy as np
import torch

from engine.profiling.phase_clock import (
    NO_LAYER,
    NONE,
    WARM_UP,
    Mark,
    Phase,
    PhaseClock,
    Sent,
    Spans,
    spans_of,
)

_Stamp = TypeVar("_Stamp")
# Steps over which the offset between host and device is estimated, and between two fits.
_RECENT, _EVERY = 64, 16
_PAUSE_NS = 1_000_000_000
_MAX_SLEW = 0.01


class NoClock(PhaseClock):
    """Keeps its position and nothing else (`profiler.enabled: false`)."""


@dataclass(slots=True)
class _Step(Generic[_Stamp]):
    """The marks of one step."""

    complete: bool = True  # all marks are stamped
    marks: list[Mark] = field(default_factory=list)
    stamps: list[_Stamp | None] = field(default_factory=list)  # one per mark, and the step's end
    sent: list[Sent] = field(default_factory=list)
    arrivals: list[_Stamp | None] = field(default_factory=list)  # None: skipped


class _StampClock(PhaseClock, ABC, Generic[_Stamp]):
    """Marks of the current step and of closed steps that were not read yet, with stamps of the
    device's kind.

    Args:
        every: steps from one complete one to the next; see `phase_clock.py`.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = every
        self._closed: list[_Step[_Stamp]] = []
        self.begin_run()

    def begin_run(self) -> None:
        """Number the steps from 0 again: their numbers decide which are complete."""
        self._step_of_run = 0
        self._step: _Step[_Stamp] = _Step()

    @property
    def is_complete(self) -> bool:
        """Whether all marks of the current step are stamped."""
        return self._step.complete

    @abstractmethod
    def _stamp(self) -> _Stamp:
        """Return a stamp of this moment, of the host or of the current stream."""

    def enter(self, phase: Phase, layer: int = NO_LAYER, tokens: int = 0) -> None:
        """End the current span and start one of `phase` that processes `tokens`."""
        step = self._step
        stamps = step.complete or layer != self._last[1] or not step.marks
        self._mark((phase, layer, tokens, NONE), self._stamp() if stamps else None)

    def record_arrival(self) -> int:
        """Note that this rank starts a collective and waits for it later; return its number."""
        self._collectives += 1
        arrivals = self._step.arrivals
        arrivals.append(self._stamp())
        return len(arrivals) - 1

    def enter_collective(
        self, phase: Phase, layer: int = NO_LAYER, tokens: int = 0, collective: int | None = None
    ) -> None:
        """End the current span and start one that waits for a collective; as in `PhaseClock`."""
        stamp, arrivals = self._stamp(), self._step.arrivals
        if collective is None:
            self._collectives += 1
            collective = len(arrivals)
            arrivals.append(stamp)
        self._mark((phase, layer, tokens, collective), stamp)

    def skip_collective(self, phase: Phase, layer: int = NO_LAYER) -> None:
        """Enter a collective that this rank leaves out; as in `PhaseClock`."""
        self._collectives += 1
        self._mark((phase, layer, 0, len(self._step.arrivals)), self._stamp())
        self._step.arrivals.append(None)

    def sent(self, num_bytes: int) -> None:
        """Count bytes that the current span sends to other ranks."""
        if self._step.marks:
            self._step.sent.append((len(self._step.marks) - 1, num_bytes))

    def close_step(self) -> None:
        """End the step's last span; later marks belong to the next step."""
        if not self._step.marks:
            return
        self._steps += 1
        self._step.stamps.append(self._stamp())
        self._closed.append(self._step)
        self._step_of_run += 1
        number = self._step_of_run
        self._step = _Step(complete=number <= WARM_UP or number % self.every == 0)

    def _mark(self, mark: Mark, stamp: _Stamp | None) -> None:
        self._last = mark
        self._step.marks.append(mark)
        self._step.stamps.append(stamp)


class HostClock(_StampClock[int]):
    """Phase clock for devices that compute synchronously: CLOCK_MONOTONIC stamps."""

    def _stamp(self) -> int:
        return time.monotonic_ns()

    def read(self, *, ended: bool = False) -> Spans | None:
        """Return the spans of the oldest closed step that was not read yet, or None."""
        if not self._closed:
            return None
        step = self._closed.pop(0)
        return spans_of(step.marks, step.sent, step.stamps, step.arrivals, step.complete)


class HostOffset:
    """How far the host's clock is ahead of a device's, which drifts: by some 10 us per second.

    An event runs no earlier than the host puts it on the stream. So the host's time just before,
    minus the device's time of the event, is at most the offset, and less by the time that the event
    waited for earlier work. The best event of a step lies just below the offset; the estimate is
    the line that lies on those of the last 64 steps, as an upper tangent does, so that it follows
    the drift and no step whose events all waited pulls it down.
    """

    def __init__(self, offset_ns: int, error_ns: int) -> None:
        """Start with an offset at the device's time 0."""
        self.error_ns = error_ns  # how far below the line the middle step lies
        self._points: deque[tuple[int, int]] = deque([(0, offset_ns)], maxlen=_RECENT)
        self._from_ns, self._offset, self._slope = 0, float(offset_ns), 0.0
        self._num_new = 0

    def add(self, device_ns: int, offset_ns: int) -> None:
        """Note a step's best event: its time on the device, and its lower bound of the offset."""
        pause = device_ns - self._points[-1][0]
        self._points.append((device_ns, offset_ns))
        self._num_new += 1
        # At first, and after a pause, the old line may be far from the points.
        few = len(self._points) <= _EVERY
        if few or pause > _PAUSE_NS or self._num_new >= _EVERY:
            self._fit()
        else:
            self._offset += max(0.0, offset_ns - self.at(device_ns))

    def at(self, device_ns: int) -> float:
        """Return the offset at a time of the device."""
        return self._offset + self._slope * (device_ns - self._from_ns)

    def _fit(self) -> None:
        self._num_new = 0
        self._from_ns, base = self._points[-1]
        points = [(float(at - self._from_ns), float(each - base)) for at, each in self._points]
        hull: list[tuple[float, float]] = []  # upper hull, from left to right
        for x, y in points:
            while len(hull) > 1 and _is_below(hull[-1], hull[-2], (x, y)):
                hull.pop()
            hull.append((x, y))
        # The edge over the points' mean is the line above all with the least distance from them.
        mean = sum(x for x, _ in points) / len(points)
        right = next(index for index, (x, _) in enumerate(hull) if x >= mean)
        (x0, y0), (x1, y1) = hull[max(0, right - 1)], hull[max(1, right)]
        self._slope = (y1 - y0) / max(1.0, x1 - x0)
        self._offset = base + y1 - self._slope * x1
        below = [y1 + self._slope * (x - x1) - y for x, y in points]
        self.error_ns = round(median(below))


def _is_below(
    point: tuple[float, float], left: tuple[float, float], right: tuple[float, float]
) -> bool:
    """Return whether a point lies on or below the line from `left` to `right`."""
    rise, run = right[1] - left[1], right[0] - left[0]
    return (point[1] - left[1]) * run <= rise * (point[0] - left[0])


# An event and the host's time just before it was put on the stream.
_Recorded = tuple[torch.cuda.Event, int]


class CudaClock(_StampClock[_Recorded]):
    """Phase clock for CUDA: events on the current stream, read one step later.

    A step is read once the next one is closed too: the host may run ahead of the device by a step,
    so work is queued behind what it reads and the device is never idle.

    Event times become nanoseconds of the host's monotonic clock, so ranks on one host compare
    directly. The device's clock drifts; `HostOffset` follows it without another sync, and stamps
    are slewed to it: they run at most 1% faster or slower, and never backwards. The last event of
    each step read is the base of the next step: the time between two events is a float32 of
    milliseconds, which resolves microseconds over seconds but not over an hour.
    """

    def __init__(self, device: torch.device, every: int = 1) -> None:
        super().__init__(every)
        self._device = device
        self._pool: list[torch.cuda.Event] = []
        self._base = torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            # The second time nothing is left to initialise.
            for _ in range(2):
                before_ns = time.monotonic_ns()
                self._base.record()
                # SYNC: twice, when the engine is built, to tie device time to host time.
                self._base.synchronize()
                error_ns = time.monotonic_ns() - before_ns
        self._base_ns, self._base_device_ns = before_ns, 0  # device time counts from here
        self._offset = HostOffset(before_ns, error_ns)

    @property
    def error_ns(self) -> int:
        """Uncertainty of the stamps against the host's clock, nanoseconds."""
        return self._offset.error_ns

    def read(self, *, ended: bool = False) -> Spans | None:
        """Return the spans of the oldest closed step that was not read yet.

        None where there is none, or, unless `ended`, where no later step is closed.
        """
        if len(self._closed) < (1 if ended else 2):
            return None
        step = self._closed.pop(0)
        assert (end := step.stamps[-1]) is not None
        # SYNC: of a step with another one queued behind it; already completed, unless neither of
        # the two sampled. Polling instead would let ranks drift apart by a step, and stamps of
        # different steps cannot be compared.
        end[0].synchronize()
        # An arrival may also be the stamp of a span; each event is read and reused once.
        both = (*step.stamps, *step.arrivals)
        recorded = {id(each): each for each in both if each is not None}
        elapsed = [self._base.elapsed_time(event) * 1e6 for event, _ in recorded.values()]
        at = dict(zip(recorded, self._host_times(np.array(elapsed), recorded), strict=True))
        stamps, arrivals = (
            [None if each is None else at[id(each)] for each in part]
            for part in (step.stamps, step.arrivals)
        )
        del recorded[id(end)]
        self._pool += [self._base, *(event for event, _ in recorded.values())]
        self._base = end[0]
        return spans_of(step.marks, step.sent, stamps, arrivals, step.complete)

    def _host_times(self, elapsed_N: np.ndarray, recorded: dict[int, _Recorded]) -> list[int]:
        """Return the host's time of a step's events, and move the base to the last one.

        elapsed_N: nanoseconds since the base by the device's clock.
        """
        device_N = self._base_device_ns + np.rint(elapsed_N).astype(np.int64)
        offset_N = np.array([ns for _, ns in recorded.values()], dtype=np.int64) - device_N
        best, end = int(offset_N.argmax()), int(device_N.max())
        self._offset.add(int(device_N[best]), int(offset_N[best]))
        length = end - self._base_device_ns
        missing = self._offset.at(end) - (self._base_ns - self._base_device_ns)
        rate = max(-_MAX_SLEW, min(_MAX_SLEW, missing / length)) if length else 0.0
        since_N = device_N - self._base_device_ns
        host_N = self._base_ns + since_N + np.rint(since_N * rate).astype(np.int64)
        self._base_device_ns, self._base_ns = end, int(host_N.max())
        return host_N.tolist()

    def _stamp(self) -> _Recorded:
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
        before_ns = time.monotonic_ns()
        event.record(torch.cuda.current_stream(self._device))
        return event, before_ns


def make_clock(device: torch.device, enabled: bool = True, every: int = 1) -> PhaseClock:
    """Return the clock for a device; a `NoClock` if not enabled.

    every: steps from one complete one to the next.
    """
    if not enabled:
        return NoClock()
    return CudaClock(device, every) if device.type == "cuda" else HostClock(every)
