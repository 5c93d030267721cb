"""Clock offsets: how far each rank's monotonic clock is from rank 0's, so that stamps can be
compared.

Ranks on one host share CLOCK_MONOTONIC and need no correction. Across hosts all ranks leave a
barrier at nearly the same moment, so the stamps taken on leaving differ by the offset plus the
barrier's own skew; the median over rounds removes what is random in it, and half the spread of the
middle half is reported as the error.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from engine.distributed.collectives import all_gather_rows, gather_objects
from engine.distributed.groups import Group

_ROUNDS = 21


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """Add `nanoseconds` to this rank's monotonic stamps to get rank 0's; `error` is its
    uncertainty, nanoseconds.
    """

    nanoseconds: int
    error: int


def measure_clock_offset(group: Group, host: str) -> ClockOffset:
    """Measure this rank's offset to rank 0 of a gloo group. Collective over `group`: every rank
    must call.
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
    return ClockOffset(int(middle), int((high - low) / 2))
