"""SIGTERM and SIGINT as an exception, raised at once or, where it must wait, at a `check`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The process was asked to stop. `exit_code` is the shell's: 128 + the signal's number."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Interrupts:
    """Context manager that turns the signals into `Stopped`; a second signal ends the process."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self._before = {signum: signal.signal(signum, self._handle) for signum in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block signals are only noted, until `check` or the end of the block.

        An error that leaves the block gives way to `Stopped` when a signal came first: a peer that
        stopped breaks this rank's collectives.
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
    def received(self) -> int:
        """The signal that came, 0 for none."""
        return self._received or 0

    def check(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self._received is not None:
            raise Stopped(self._received)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._received is not None:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        self._received = signum
        if not self._deferred:
            raise Stopped(signum)
