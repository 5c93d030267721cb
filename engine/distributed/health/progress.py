"""Progress: how far a rank has come, and its reporter for the work outside of the lockstep.

In the lockstep the phase clock counts steps and collectives. Before and after it, ranks read files
for as long as that takes while others wait: a time limit would end a job that is only slow. So the
work there calls `ProgressReporter.advance` as it advances. The watchdog publishes the progress, and
`diagnosis.py` finds a rank at fault only where others wait for it and it makes none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# starting, finishing: before and after the lockstep, where each rank takes its own time.
# collective_failed: a collective failed on it. failed: by its own fault. exited: publishes no more.
State = Literal["starting", "running", "finishing", "collective_failed", "failed", "exited"]
# The phase of a rank that has done its part outside of the lockstep.
WAITING = "waiting for the others"
# As phase_clock.COLLECTIVE_PHASES.
_WAITING_PHASES = ("consensus", "dispatch", "combine", "control", "tensor")
OnProgress = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rank has come."""

    step: int = 0  # outside of the lockstep: grows whenever the rank advances
    layer: int = -1  # -1: outside of the layers
    phase: str = "other"  # outside of the lockstep: what the rank is doing, as printed in a report
    collective: int = 0  # collectives started so far; 0 outside of the lockstep

    @property
    def is_waiting(self) -> bool:
        """Return whether the phase is one in which a rank waits for others."""
        return self.phase in _WAITING_PHASES or self.phase == WAITING

    def __str__(self) -> str:
        if not self.collective:
            return self.phase
        layer = f"layer {self.layer}, " if self.layer >= 0 else ""
        return f"step {self.step}, {layer}{self.phase}, collective {self.collective}"


class ProgressReporter:
    """Progress of one rank outside of the lockstep.

    Any thread may call `advance`. Of two simultaneous calls one may be lost; the next counts.
    """

    def __init__(self) -> None:
        self.progress = Progress()  # read by the watchdog's thread; its step only grows

    def begin(self, what: str) -> None:
        """Start a new phase: what the rank does, as in `has been loading the model for 5 s`."""
        self.progress = Progress(self.progress.step + 1, phase=what)

    def advance(self) -> None:
        """Report that the current phase has advanced."""
        self.begin(self.progress.phase)

    def wait(self) -> None:
        """Report that this rank has done its part and waits for the others."""
        self.begin(WAITING)


def ignore_progress() -> None:
    """Do nothing: for work whose progress is not monitored."""
