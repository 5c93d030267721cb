"""Clock offsets: how far each rank's monotonic clock is from rank 0's, so that stamps can be
compared.

Ranks on one host share CLOCK_MONOTONIC and need no correction. Across hosts all ranks leave a
barrier at nearly the same moment, so the stamps taken on leaving differ by the offset plus the
barrier's own skew; the median over rounds removes what is random in it, and half the spread of the
middle half is reported as the error.
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
    """Add `nanoseconds` to this rank's monotonic stamps to get rank 0's; `error` is its
    uncertainty, nanoseconds. shared: all ranks are on one host and read the same clock.
    """

    nanoseconds: int
    error: int
    shared: bool = True


def measure_clock_offset(group: Group, host: str) -> ClockOffset:
    """Measure this rank's offset to rank 0 of a host-side group. Collective over `group`: every
    rank must call.
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
    """Follows an offset through a run: clocks drift by some ten microseconds a second.

    Ranks leave every exchange of control words at about the same moment. Who is how much later is
    partly the collective's own habit, so only the change since the start is believed.
    """

    def __init__(self, start: ClockOffset, rank: int) -> None:
        self.nanoseconds = start.nanoseconds
        self._start, self._rank = start, rank
        self._recent: deque[int] = deque(maxlen=_RECENT)
        self._habit: float | None = None
        self._count = 0

    def note(self, left_W: np.ndarray) -> None:
        """Take the stamps, int64 [W], at which the ranks left one collective, each by its own
        clock; negative ones are unknown.
        """
        if self._start.shared or left_W[0] < 0 or left_W[self._rank] < 0:
            return
        self._recent.append(int(left_W[0]) - int(left_W[self._rank]))
        self._count += 1
        if self._count % _EVERY:
            return
        middle = float(np.median(self._recent))
        if self._habit is None:
            self._habit = middle
        self.nanoseconds = self._start.nanoseconds + int(middle - self._habit)
