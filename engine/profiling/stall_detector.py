"""Stall detector: when this process did not run at all: stopped, swapped out, without a core.

Stamps cannot tell that. Where a rank is stopped in the middle of an all-to-all, all ranks leave it
late, and it looks like a slow network. So a thread looks at the clock twenty times a second; where
it sleeps far longer than it meant to, nothing else of the process ran either.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

_PERIOD_S = 0.05
# Less than this a busy host may keep anybody waiting for a core.
_LEAST_S = 0.15


class StallDetector:
    """Counts them while its block runs. count, seconds: so far."""

    def __init__(self, enabled: bool = True) -> None:
        self.count = 0
        self.seconds = 0.0
        self._enabled = enabled
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="absences", daemon=True)

    def __enter__(self) -> StallDetector:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._enabled:
            self._thread.join()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(_PERIOD_S):
            now = time.monotonic()
            if (missing := now - last - _PERIOD_S) >= _LEAST_S:
                self.count += 1
                self.seconds += missing
            last = now
