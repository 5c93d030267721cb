"""Activity: what a rank does before and after the lockstep, and that it gets on with it.

In the lockstep the phase clock says how far a rank has come (`faults.Place`). Outside of it ranks
read files for as long as that takes, and the others wait: a time limit would end a job that is only
slow. So whoever works there says now and then that it has come further. The watchdog publishes it,
and gives up only a rank that others wait for and that has not moved at all.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.distributed.faults import WAITING, Place

Tick = Callable[[], None]


def no_tick() -> None:
    """For work that nobody watches."""


class Activity:
    """One rank's. place: what the watchdog's thread publishes; its step only ever grows. Any thread
    may tick: of two ticks at once one may get lost, which the next makes up for.
    """

    def __init__(self) -> None:
        self.place = Place()

    def begin(self, what: str) -> None:
        """Something new: what the rank is doing, as in `has been loading the model for 5 s`."""
        self.place = Place(self.place.step + 1, phase=what)

    def tick(self) -> None:
        """The same, further on."""
        self.begin(self.place.phase)

    def wait(self) -> None:
        """This rank has done its part and waits for the others."""
        self.begin(WAITING)
