"""Stall detector: notices when this process did not run at all: stopped, swapped out, no free core.

Stamps do not show that. Where a rank is stopped in the middle of an all-to-all, all ranks leave it
late, as with a slow network. So a thread reads the clock twenty times per second; where it slept
much longer than it asked for, the rest of the process did not run either: a process stall.
"""

from __future__ import annotations

import threading
import time

_PERIOD_S = 0.05
# Shorter delays are usual on a busy host.
_LEAST_S = 0.15


class StallDetector:
    """Counts process stalls while its block runs."""

    def __init__(self, enabled: bool = True) -> None:
        self.count = 0  # stalls so far
        self.seconds = 0.0  # of all of them
        self._enabled = enabled
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-detector", daemon=True)

    def __enter__(self) -> StallDetector:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._enabled:
            self._thread.join()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(_PERIOD_S):
            now = time.monotonic()
            if (stalled := now - last - _PERIOD_S) >= _LEAST_S:
                self.count += 1
                self.seconds += stalled
            last = now
