"""Seconds of collectives by their bytes, as measured between two real processes.

The collectives of simulated ranks (`simulated_layer.py`, `simulated_ranks.py`) are assumed to take
as long. A call is looked up by the bytes that its busiest rank sends to others or receives from
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bench.candidate import Running

Kind = Literal["all_to_all", "all_gather", "all_reduce"]
KINDS: tuple[Kind, ...] = ("all_to_all", "all_gather", "all_reduce")
SIZES = (8, 1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)


@dataclass(frozen=True, slots=True)
class Transfers:
    """Seconds of one kind of collective by bytes, ascending."""

    num_bytes: tuple[int, ...]
    seconds: tuple[float, ...]

    def of(self, num_bytes: float) -> float:
        """Return seconds, interpolated; beyond the table in proportion to its last entry."""
        if num_bytes > self.num_bytes[-1]:
            return self.seconds[-1] * num_bytes / self.num_bytes[-1]
        return float(np.interp(num_bytes, self.num_bytes, self.seconds))


NO_TRANSFERS = Transfers((0, 1), (0.0, 0.0))


def measure_transfers(running: Running, rounds: int = 9) -> dict[Kind, Transfers]:
    """Measure between the ranks of a running `moe_capacity` worker; the slower rank counts."""
    found: dict[Kind, Transfers] = {}
    for kind in KINDS:
        replies = running.call("exchange", kind=kind, num_bytes=list(SIZES), rounds=rounds)
        slower = zip(*(reply["seconds"] for reply in replies), strict=True)
        found[kind] = Transfers(SIZES, tuple(max(pair) for pair in slower))
    return found
