"""Elects one rank per host to print the fault report when the store is unreachable.

All ranks of a host know of a file; the first to remove it speaks. With several hosts there is one
speaker a host, which is one a log.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path


class ReportElection:
    """A run's voice on this host. run: a name that no other run has; every rank makes one."""

    def __init__(self, run: str) -> None:
        self._path = Path(tempfile.gettempdir()) / f"lockstep-{run.replace('/', '-')}.voice"
        self._there = False

    def open(self) -> None:
        """Make the file."""
        with suppress(OSError):  # then everybody speaks, which is better than nobody
            self._path.touch()
            self._there = True

    def take(self) -> bool:
        """Whether this rank is the one to speak; to be asked once."""
        if not self._there:
            return True
        try:
            self._path.unlink()
        except OSError:
            return False
        return True

    def drop(self) -> None:
        """Nobody needs to speak any more."""
        with suppress(OSError):
            self._path.unlink()
