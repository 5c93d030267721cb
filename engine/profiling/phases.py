"""Phase clock: where each rank's time goes, always on, a few hundred nanoseconds a mark.

A step is cut into spans by marks: `clock.enter(phase)` ends the span before it. The three phases
that hold exactly one collective each (CONSENSUS, DISPATCH, COMBINE, plus CONTROL once a step) start
at the collective's call, so a span's start is the rank's *arrival* at that collective; `waiting.py`
compares arrivals across ranks and splits the span into waiting for late peers and transfer.

On CUDA a mark records an event on the current stream and nothing is read before the next step asks
for it, so the clock never synchronises the device in the middle of a step.
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
_IS_COLLECTIVE = np.isin(np.arange(len(Phase)), COLLECTIVE_PHASES)


@dataclass(frozen=True, slots=True)
class Spans:
    """The spans of one step on one rank, in order.

    phases: int64 [n]. starts, ends: int64 [n], nanoseconds of this rank's monotonic clock.
    """

    phases: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @property
    def collectives(self) -> np.ndarray:
        """Indices of the spans that hold a collective; as many on every rank of the group."""
        return np.flatnonzero(_IS_COLLECTIVE[self.phases])

    def seconds_by_phase(self) -> np.ndarray:
        """float64 [len(Phase)], seconds in each phase."""
        durations = (self.ends - self.starts) * 1e-9
        return np.bincount(self.phases, weights=durations, minlength=len(Phase))


class PhaseClock(Protocol):
    """One rank's clock."""

    def enter(self, phase: Phase) -> None:
        """End the current span and start one of `phase`."""
        ...

    def close_step(self) -> None:
        """End the step's last span; later marks belong to the next step."""
        ...

    def read(self) -> Spans | None:
        """Return the spans of the oldest closed step that were not read yet, None when there is
        none.
        """
        ...


class HostClock:
    """Phase clock for devices that compute synchronously: CLOCK_MONOTONIC stamps."""

    def __init__(self) -> None:
        self._phases: list[int] = []
        self._stamps: list[int] = []
        self._closed: list[Spans] = []

    def enter(self, phase: Phase) -> None:
        """End the current span and start one of `phase`."""
        self._phases.append(phase)
        self._stamps.append(time.monotonic_ns())

    def close_step(self) -> None:
        """End the step's last span; later marks belong to the next step."""
        if not self._phases:
            return
        self._stamps.append(time.monotonic_ns())
        stamps = np.array(self._stamps, dtype=np.int64)
        self._closed.append(Spans(np.array(self._phases), stamps[:-1], stamps[1:]))
        self._phases.clear()
        self._stamps.clear()

    def read(self) -> Spans | None:
        """Return the spans of the oldest closed step that were not read yet, None when there is
        none.
        """
        return self._closed.pop(0) if self._closed else None


class CudaClock:
    """Phase clock for CUDA: events on the current stream, read once they have passed.

    Event times are turned into nanoseconds of the host's monotonic clock through one base event
    that was synchronised when the clock was made, so ranks on one host compare directly.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: list[torch.cuda.Event] = []
        self._phases: list[int] = []
        self._events: list[torch.cuda.Event] = []
        self._closed: list[tuple[list[int], list[torch.cuda.Event]]] = []
        self._base = torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            self._base.record()
        # SYNC: once, when the engine is built, to tie device time to host time.
        self._base.synchronize()
        self._base_ns = time.monotonic_ns()

    def enter(self, phase: Phase) -> None:
        """End the current span and start one of `phase`."""
        self._phases.append(phase)
        self._events.append(self._mark())

    def close_step(self) -> None:
        """End the step's last span; later marks belong to the next step."""
        if not self._phases:
            return
        self._events.append(self._mark())
        self._closed.append((self._phases, self._events))
        self._phases, self._events = [], []

    def read(self) -> Spans | None:
        """Return the spans of the oldest closed step that were not read yet, None when there is
        none.
        """
        if not self._closed:
            return None
        phases, events = self._closed.pop(0)
        # SYNC: the host has read this step's tokens, so its last event has passed or is about to.
        # Polling instead would let ranks drift apart by a step, and stamps of different steps
        # cannot be compared.
        events[-1].synchronize()
        stamps = np.array([self._base.elapsed_time(event) for event in events])
        stamps = (stamps * 1e6).astype(np.int64) + self._base_ns
        self._pool.extend(events)
        return Spans(np.array(phases), stamps[:-1], stamps[1:])

    def _mark(self) -> torch.cuda.Event:
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


class NoClock:
    """A clock that keeps nothing (`profiler.enabled: false`)."""

    def enter(self, phase: Phase) -> None:
        """Do nothing."""

    def close_step(self) -> None:
        """Do nothing."""

    def read(self) -> Spans | None:
        """There is never anything to read."""
        return None


def make_clock(device: torch.device, enabled: bool = True) -> PhaseClock:
    """Return the clock that fits the device."""
    if not enabled:
        return NoClock()
    return CudaClock(device) if device.type == "cuda" else HostClock()
