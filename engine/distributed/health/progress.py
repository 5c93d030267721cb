"""ProgressReporter: what a rank does before and after the lockstep, and that it gets on with it.

In the lockstep the phase clock says how far a rank has come (`faults.Progress`). Outside of it
ranks read files for as long as that takes, and the others wait: a time limit would end a job that
is only slow. So whoever works there says now and then that it has come further. The watchdog
publishes it, and gives up only a rank that others wait for and that has not moved at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Tick = Callable[[], None]


def no_tick() -> None:
    """For work that nobody watches."""


class ProgressReporter:
    """One rank's. place: what the watchdog's thread publishes; its step only ever grows. Any thread
    may tick: of two ticks at once one may get lost, which the next makes up for.
    """

    def __init__(self) -> None:
        self.place = Progress()

    def begin(self, what: str) -> None:
        """Something new: what the rank is doing, as in `has been loading the model for 5 s`."""
        self.place = Progress(self.place.step + 1, phase=what)

    def tick(self) -> None:
        """The same, further on."""
        self.begin(self.place.phase)

    def wait(self) -> None:
        """This rank has done its part and waits for the others."""
        self.begin(WAITING)


# starting, finishing: before and after the lockstep, where each rank takes its own time. cut: a
# collective broke under it. failed: by its own fault. left: nothing more will be heard of it.
State = Literal["starting", "running", "finishing", "cut", "failed", "left"]


# As phases.COLLECTIVE_PHASES.
_WAITING_PHASES = ("consensus", "dispatch", "combine", "control", "tensor")


# What a rank does outside of the lockstep once it has done its part (`activity.py`).
WAITING = "waiting for the others"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rank has come. layer: -1 outside of the layers. phase: its name. collective: how
    many it has started; 0 outside of the lockstep, where phase says in words what the rank does and
    step grows whenever it gets on with it.
    """

    step: int = 0
    layer: int = -1
    phase: str = "other"
    collective: int = 0

    @property
    def waits(self) -> bool:
        """Whether a rank there waits for others."""
        return self.phase in _WAITING_PHASES or self.phase == WAITING

    def __str__(self) -> str:
        if not self.collective:
            return self.phase
        layer = f"layer {self.layer}, " if self.layer >= 0 else ""
        return f"step {self.step}, {layer}{self.phase}, collective {self.collective}"
