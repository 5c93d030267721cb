"""Phase clock: where each rank's time goes, always on, a few hundred nanoseconds a mark.

A step is cut into spans by marks: `clock.enter(phase)` ends the span before it. A span that waits
for a collective is begun with `clock.enter_collective(phase)` instead. The rank's *arrival* at the
collective is where it started it: the same moment, or an earlier one that `clock.record_arrival()`
has noted, where other work was done in between. `waiting.py` compares arrivals across ranks.

The clocks themselves are in `clocks.py`. The last mark is also what the watchdog publishes: see
`Position`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np


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
    TENSOR = 9


# TENSOR is a collective of a tensor group, whose ranks wait for each other alone.
COLLECTIVE_PHASES = (
    Phase.CONSENSUS,
    Phase.DISPATCH,
    Phase.COMBINE,
    Phase.CONTROL,
    Phase.TENSOR,
)
NO_LAYER = -1
# The collective of a span that waits for none; the stamp of a collective that was not started.
NONE = -1


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
    when this rank started each collective of the step; as many on every rank of the group, and NONE
    where this rank's tensor group left out one that others may have called.
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


# What clocks keep of a span: phase, layer, tokens, collective
Mark = tuple[int, int, int, int]
# span, bytes
Sent = tuple[int, int]


def spans_of(
    columns: np.ndarray, sent: list[Sent], stamps: np.ndarray, arrivals: np.ndarray
) -> Spans:
    """One step's spans. columns: int64 [4, n], the marks of n spans. stamps: int64 [n + 1]."""
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

    def record_arrival(self) -> int:
        """Note that a collective is being started, to be waited for later; return its number."""
        ...

    def enter_collective(
        self,
        phase: Phase,
        layer: int = NO_LAYER,
        tokens: int = 0,
        collective: int | None = None,
        *,
        absent: bool = False,
    ) -> None:
        """End the current span and start one that waits for a collective: the one whose number is
        given, otherwise one that is being started now. absent: that this rank's tensor group has no
        need of, and other ranks may have.
        """
        ...

    def sent(self, num_bytes: int) -> None:
        """Count bytes sent to other ranks to the current span."""
        ...

    def close_step(self) -> None:
        """End the step's last span; later marks belong to the next step."""
        ...

    def read(self, *, ended: bool = False) -> Spans | None:
        """Return the spans of the oldest closed step that were not read yet; None when there is
        none, or none that the device has surely passed. ended: no step follows.
        """
        ...

    def position(self) -> Position:
        """How far this rank has come; may be asked for by another thread."""
        ...
