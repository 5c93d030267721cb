"""Local consensus: a rank caps its own tokens by its own load, as the paper does (section 3.2).

Nothing is communicated to decide. Where ranks have different traffic it drops far more than needed:
an expert that is overloaded on one rank and idle on the others has only that rank's quota.

Legend: N claims of this rank, P pools.
"""

from __future__ import annotations

from engine.moe.capacity.consensus import Claims, PendingSelection, Selection
from engine.ops.select_top import select_top


class LocalConsensus:
    """No collective."""

    communicates = False
    counts_only = False

    def begin(self, claims: Claims) -> PendingSelection:
        """Return at once: the selection needs this rank alone."""
        return _PendingLocal(claims)


class _PendingLocal:
    complete = False

    def __init__(self, claims: Claims) -> None:
        self._claims = claims

    def wait(self) -> None:
        """Return at once."""

    def select(self, *, exact: bool) -> Selection:
        """Select this rank's best up to its own limit; always exact. No collective."""
        claims = self._claims
        keep_N, tied = select_top(claims.keys, claims.pool_N, claims.limit_P)
        own_P = claims.by_pool(claims.count_codes()[: claims.num_experts])
        return Selection(keep_N, own_P.minimum(claims.limit_P), tied, None)
