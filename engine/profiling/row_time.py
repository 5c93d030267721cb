"""RowTime: how long this rank's experts have recently needed per row.

Only calls with enough rows count: a small call is bound by reading weights and does not depend on
the device's speed. The average decays exponentially, so a device that slows down shows within some
ten steps.
"""

from __future__ import annotations

import numpy as np

from engine.profiling.phase_clock import Phase, Spans

_ENOUGH_ROWS = 32
_KEEP = 0.85


class RowTime:
    """One rank's moving average."""

    def __init__(self) -> None:
        self._nanoseconds = 0.0
        self._rows = 0.0

    def add(self, spans: Spans) -> None:
        """Add a step; one that is not complete has no lengths of calls, and is left out."""
        calls = (spans.phases == Phase.EXPERTS) & (spans.tokens >= _ENOUGH_ROWS)
        if not spans.complete or not calls.any():
            return
        nanoseconds = float((spans.ends - spans.starts)[calls].sum())
        self._nanoseconds = _KEEP * self._nanoseconds + nanoseconds
        self._rows = _KEEP * self._rows + float(np.sum(spans.tokens[calls]))

    @property
    def picoseconds_per_row(self) -> int:
        """Time per row; 0 while unknown."""
        return max(1, int(1e3 * self._nanoseconds / self._rows)) if self._rows else 0
