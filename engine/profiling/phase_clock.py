"""Phase clock: where each rank's time goes, always on, a few hundred nanoseconds per mark.

A step is cut into spans by marks: `clock.enter(phase)` ends the span before it. A span that waits
for a collective is begun with `clock.enter_collective(phase)` instead. The rank's *arrival* at the
collective is when it started it: the same moment, or an earlier one that `clock.record_arrival()`
has noted, where other work was done in between. `wait_time.py` compares arrivals across ranks.

On CUDA a stamp costs microseconds of the host. So only every nth step is *complete*, n being
`profiler.every`; in the others a stamp is taken where a collective starts and where the layer
changes. Waiting is exact all the same; time between two stamps counts in the span after the first
of them, and `collector.py` splits it as it was split in the last complete step. The number of the
step decides, so all ranks stamp alike.

The clocks themselves are in `device_clocks.py`. The last mark is also this rank's progress, which
the watchdog publishes: see `Position`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

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
    GRAPH = 10  # a whole decode step, replayed by a CUDA graph


# TENSOR is a collective of one tensor group: its ranks wait for each other only. GRAPH, begun as a
# collective, is none: the ranks meet within it.
COLLECTIVE_PHASES = (Phase.CONSENSUS, Phase.DISPATCH, Phase.COMBINE, Phase.CONTROL, Phase.TENSOR)
NO_LAYER = -1
# The first steps of a run compile kernels and make connections; they are always complete.
WARM_UP = 2
_EVERY_STEPS = 16  # without stamps, from one complete step to the next
# The collective of a span that waits for none; the stamp of a collective that was skipped.
NONE = -1


@dataclass(frozen=True, slots=True)
class Position:
    """How far a rank has come; a fault report names it."""

    step: int  # steps it has closed
    layer: int  # NO_LAYER outside of the layers
    phase: Phase
    collective: int  # collectives it has started since the engine was built


@dataclass(frozen=True, slots=True)
class Spans:
    """The n spans of one step on one rank, in order; each begins where the one before it ends.

    Stamps are nanoseconds of this rank's monotonic clock.
    """

    phases: np.ndarray  # int64 [n]
    layers: np.ndarray  # int64 [n], NO_LAYER outside of the layers
    tokens: np.ndarray  # int64 [n], tokens processed; rows in DISPATCH, EXPERTS and COMBINE
    num_bytes: np.ndarray  # int64 [n], sent to other ranks
    collectives: np.ndarray  # int64 [n], which of the step's collectives it waited for, or NONE
    starts: np.ndarray  # int64 [n]
    ends: np.ndarray  # int64 [n]
    # int64 [C], when this rank started each collective of the step. C is the same on every rank of
    # the group; NONE where this rank's tensor group skipped one that others may have called.
    arrivals: np.ndarray
    complete: bool = True  # False: only the spans of `stamped` have a length, up to the next stamp

    @property
    def seconds(self) -> np.ndarray:
        """Return the length of every span, float64 [n]."""
        return (self.ends - self.starts) * 1e-9

    def stamped(self) -> np.ndarray:
        """Return the spans whose start is stamped in a step that is not complete, bool [n]."""
        stamped = self.collectives >= 0
        stamped[:1] = True
        stamped[1:] |= self.layers[1:] != self.layers[:-1]
        return stamped

    def seconds_by_phase(self) -> np.ndarray:
        """Return the seconds in each phase, float64 [len(Phase)]."""
        return np.bincount(self.phases, weights=self.seconds, minlength=len(Phase))


Mark = tuple[int, int, int, int]  # begin of a span: phase, layer, tokens, collective
Sent = tuple[int, int]  # span, bytes


def spans_of(
    marks: list[Mark],
    sent: list[Sent],
    stamps: list[int | None],
    arrivals: list[int | None],
    complete: bool,
) -> Spans:
    """Build one step's spans.

    Args:
        marks: n of them.
        sent: bytes sent to other ranks; a span may have several entries.
        stamps: n + 1, each span's start, where it was stamped, and the last one's end.
        arrivals: C; None: skipped.
        complete: whether all marks are stamped.
    """
    phases, layers, tokens, collectives = np.array(marks, dtype=np.int64).T
    if complete:
        times = np.array(stamps, dtype=np.int64)
    else:  # a span without a stamp lies at the next one, with no length
        at = [index for index, stamp in enumerate(stamps) if stamp is not None]
        known = np.array([stamps[index] for index in at], dtype=np.int64)
        times = known[np.searchsorted(at, np.arange(len(stamps)))]
    arrived = [NONE if stamp is None else stamp for stamp in arrivals]
    num_bytes = np.zeros(len(phases), dtype=np.int64)
    for span, amount in sent:
        num_bytes[span] += amount
    return Spans(
        phases,
        layers,
        tokens,
        num_bytes,
        collectives,
        starts=times[:-1],
        ends=times[1:],
        arrivals=np.array(arrived, dtype=np.int64),
        complete=complete,
    )


class PhaseClock:
    """One rank's clock. This base keeps the rank's position and records no spans."""

    every = 1  # steps from one complete one to the next

    def __init__(self) -> None:
        self._steps = 0
        self._collectives = 0
        self._last: Mark = (Phase.OTHER, NO_LAYER, 0, NONE)

    def begin_run(self) -> None:
        """Number the steps from 0 again: their numbers decide which are complete."""

    @property
    def is_complete(self) -> bool:
        """Whether the current step is to have all its marks, the same on every rank: then no graph
        runs it. Without stamps they still are this rank's progress.
        """
        return self._steps % _EVERY_STEPS == 0

    def enter(self, phase: Phase, layer: int = NO_LAYER, tokens: int = 0) -> None:
        """End the current span and start one of `phase` that processes `tokens`."""
        self._last = (phase, layer, tokens, NONE)

    def record_arrival(self) -> int:
        """Note that this rank starts a collective and waits for it later; return its number."""
        self._collectives += 1
        return NONE

    def enter_collective(
        self, phase: Phase, layer: int = NO_LAYER, tokens: int = 0, collective: int | None = None
    ) -> None:
        """End the current span and start one that waits for a collective.

        collective: its number from `record_arrival`; None: it is started now.
        """
        if collective is None:
            self._collectives += 1
        self._last = (phase, layer, tokens, NONE)

    def skip_collective(self, phase: Phase, layer: int = NO_LAYER) -> None:
        """Enter a collective that this rank's tensor group leaves out and other groups may call.

        It is counted, so that all ranks number alike, but has no arrival.
        """
        self.enter_collective(phase, layer)

    def sent(self, num_bytes: int) -> None:
        """Count bytes that the current span sends to other ranks."""

    def close_step(self) -> None:
        """End the step's last span; later marks belong to the next step."""
        self._steps += 1

    def read(self, *, ended: bool = False) -> Spans | None:
        """Return the spans of the oldest closed step that was not read yet.

        None where there is none, or where reading it could leave the device without work.
        ended: no step follows.
        """
        return None

    @property
    def error_ns(self) -> int:
        """Uncertainty of the stamps against the host's monotonic clock, nanoseconds."""
        return 0

    def position(self) -> Position:
        """Return how far this rank's host has come; any thread may call it."""
        phase, layer, *_ = self._last
        return Position(self._steps, layer, Phase(phase), self._collectives)
