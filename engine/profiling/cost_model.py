"""Cost model: how long a rank's calls take per number of tokens, to compare ranks at equal load.

Small calls are bound by the weights that they read and large ones by arithmetic, so seconds per
token alone say little about a device. Calls are put into buckets by their number of tokens (a
bucket is a quarter of a doubling), and a rank's calls are priced with its peers' curves.

Worked example: peers need 2 ms for 100 tokens and 6 ms for 500. A rank that had 10 calls of 300 and
spent 60 ms on them is priced at 10 * 4 ms, so its relative compute time is 1.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_PER_DOUBLING = 4
_BUCKETS = 26 * _PER_DOUBLING


class CostCurve:
    """Calls of one kind on one rank."""

    def __init__(self) -> None:
        self.table = np.zeros((3, _BUCKETS))  # calls, tokens and seconds of every bucket

    def add(self, tokens_N: np.ndarray, nanoseconds_N: np.ndarray) -> None:
        """Count N calls: int64 tokens, at least 1 per call, and int64 nanoseconds."""
        bucket_N = (np.log2(tokens_N) * _PER_DOUBLING).astype(np.int64).clip(0, _BUCKETS - 1)
        self.table[0] += np.bincount(bucket_N, minlength=_BUCKETS)
        self.table[1] += np.bincount(bucket_N, weights=tokens_N, minlength=_BUCKETS)
        self.table[2] += np.bincount(bucket_N, weights=nanoseconds_N, minlength=_BUCKETS) * 1e-9


@dataclass(frozen=True, slots=True)
class ExpertCost:
    """What the calls of one rank's experts cost: the used buckets of a curve, ascending."""

    calls: list[int]
    rows: list[float]  # of a mean call
    seconds: list[float]  # of a mean call

    @classmethod
    def of(cls, table: np.ndarray) -> ExpertCost | None:
        """Return the used part of a table [3, buckets]; None without calls."""
        calls, rows, seconds = table[:, table[0] > 0]
        if not calls.size:
            return None
        return cls(
            calls.astype(int).tolist(),
            (rows / calls).round(1).tolist(),
            (seconds / calls).round(9).tolist(),
        )


def price(own: np.ndarray, peers: Sequence[np.ndarray]) -> float:
    """Return the seconds that the peers would have needed for `own`'s calls; nan without any.

    The result is the median of the peers' prices. A peer's curve is linear between its buckets;
    below its smallest call it is constant, above its largest one it has that one's seconds per
    token.

    Args:
        own, peers: tables [3, buckets] of `CostCurve`.
    """
    calls, tokens = own[0], own[1]
    used = calls > 0
    prices = []
    for table in peers:
        known = table[0] > 0
        if not known.any() or not used.any():
            continue
        sizes = table[1, known] / table[0, known]
        seconds = table[2, known] / table[0, known]
        mine = tokens[used] / calls[used]
        each = np.interp(mine, sizes, seconds)
        each = np.where(mine > sizes[-1], seconds[-1] * mine / sizes[-1], each)
        prices.append(float((each * calls[used]).sum()))
    return float(np.median(prices)) if prices else float("nan")
