"""Interrupts: SIGTERM and SIGINT as an exception, raised at once or, if deferred, at a `check`.

Batch systems send SIGTERM some time before they kill a job: the requests in flight may finish
within runtime.drain_s. SIGINT comes from a terminal and stops at the next step.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_S = 1.0  # a launcher and the process group both forward a signal that was sent once


class Stopped(BaseException):
    """The process is to stop. `exit_code` is 128 + the signal's number, as in shells."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class StopRequest(NamedTuple):
    """Whether this rank is to stop, and how."""

    signal: int = 0  # the signal received; 0: none
    now: bool = False  # stop without finishing the running requests


class Interrupts:
    """Context manager that turns the signals into `Stopped`; a second signal ends the process.

    The same signal again within a second counts as a duplicate of the first.
    """

    def __init__(self, drain_s: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        """drain_s: seconds after SIGTERM in which running requests may finish."""
        self._drain_s = drain_s
        self._clock = clock
        self._received: int | None = None
        self._received_at = 0.0
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {signum: signal.signal(signum, self._handle) for signum in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block signals are only recorded, until `check` or the end of the block.

        An error that leaves the block becomes `Stopped` when a signal was received before: a peer
        that stopped breaks this rank's collectives.
        """
        self._deferred = True
        try:
            yield
        except Exception as error:
            if self._received is not None:
                raise Stopped(self._received) from error
            raise
        finally:
            self._deferred = False
        self.check()

    @property
    def request(self) -> StopRequest:
        """What the received signal requires at this time."""
        if self._received is None:
            return StopRequest()
        drained = self._clock() - self._received_at >= self._drain_s
        return StopRequest(self._received, self._received == signal.SIGINT or drained)

    def finished(self) -> None:
        """Mark all work as done: clears a signal that allowed it to finish."""
        if not self.request.now:
            self._received = None

    def check(self) -> None:
        """Raise `Stopped` if a signal was received."""
        if self._received is not None:
            raise Stopped(self._received)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self._received is not None:
            if signum == self._received and now - self._received_at < _SAME_S:
                return
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self._received, self._received_at = signum, now
        if not self._deferred:
            raise Stopped(signum)
