"""Clock offsets: how far each rank's monotonic clock is from rank 0's, to compare timestamps.

Ranks on one host share CLOCK_MONOTONIC and need no correction. Across hosts all ranks leave a
barrier at nearly the same moment, so the timestamps taken on leaving differ by the offset plus the
barrier's own skew. The median over rounds removes the random part of the skew; half the
interquartile range is reported as the error.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from engine.distributed.collectives import all_gather_rows, gather_objects
from engine.distributed.groups import Group

_ROUNDS = 21
# Collectives over which a drifting offset is smoothed, and between two corrections.
_RECENT, _EVERY = 64, 16


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """What to add to this rank's monotonic timestamps to get rank 0's."""

    nanoseconds: int
    error: int  # uncertainty, nanoseconds
    shared: bool = True  # all ranks are on one host and read the same clock


def measure_clock_offset(group: Group, host: str) -> ClockOffset:
    """Measure this rank's offset to rank 0 of a host-side group.

    Collective over `group`: every rank must call.
    """
    if len(set(gather_objects(host, group))) == 1:
        return ClockOffset(0, 0)
    differences = np.empty(_ROUNDS)
    for round_ in range(_ROUNDS):
        dist.barrier(group.handle)
        stamp = torch.tensor([time.monotonic_ns()])
        stamps = all_gather_rows(stamp, group)
        differences[round_] = int(stamps[0]) - int(stamps[group.rank])
    low, middle, high = np.percentile(differences, (25, 50, 75))
    return ClockOffset(int(middle), int((high - low) / 2), shared=False)


class ClockTracker:
    """Tracks an offset through a run: clocks drift by some ten microseconds per second.

    Ranks leave every exchange of control messages at about the same moment. How much later a rank
    leaves is partly a constant of the collective, so only the change since the start is applied.
    """

    def __init__(self, start: ClockOffset, rank: int) -> None:
        self.nanoseconds = start.nanoseconds
        self._start, self._rank = start, rank
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self._bias: float | None = None
        self._count = 0

    def note(self, left_W: np.ndarray) -> None:
        """Update the offset from one collective.

        Args:
            left_W: int64 [W], when each rank left it, nanoseconds of its own clock; negative where
                unknown.
        """
        if self._start.shared or left_W[0] < 0 or left_W[self._rank] < 0:
            return
        self._recent.append(int(left_W[0]) - int(left_W[self._rank]))
        self._count += 1
        if self._count % _EVERY:
            return
        middle = float(np.median(self._recent))
        if self._bias is None:
            self._bias = middle
        self.nanoseconds = self._start.nanoseconds + int(middle - self._bias)
