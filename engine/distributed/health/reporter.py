"""Elects one rank per host to print the fault report when the store is unreachable.

All ranks of a host create the same file; the first to remove it prints. With several hosts that is
one report per host, which is one per log.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path


class ReportElection:
    """The election of one run on this host. run: a name that no other run has."""

    def __init__(self, run: str) -> None:
        self._path = Path(tempfile.gettempdir()) / f"lockstep-{run.replace('/', '-')}.report"
        self._exists = False

    def open(self) -> None:
        """Create the file."""
        with suppress(OSError):  # then every rank reports, which is better than none
            self._path.touch()
            self._exists = True

    def try_acquire(self) -> bool:
        """Return whether this rank is elected. To be called once."""
        if not self._exists:
            return True
        try:
            self._path.unlink()
        except OSError:
            return False
        return True

    def release(self) -> None:
        """Remove the file: no report is needed any more."""
        with suppress(OSError):
            self._path.unlink()
