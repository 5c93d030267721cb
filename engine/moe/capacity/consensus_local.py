"""Local consensus: a rank caps its own tokens by its own load, as the paper does (section 3.2).

Nothing is communicated to decide. Where ranks see different traffic it drops far more than needed:
an expert that is hot on one rank and idle on the others still has only that rank's share.

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
        """Nothing is under way: the decision needs this rank alone."""
        return _PendingLocal(claims)


class _PendingLocal:
    complete = False

    def __init__(self, claims: Claims) -> None:
        self._claims = claims

    def wait(self) -> None:
        """There is nothing to wait for."""

    def verdict(self, *, exact: bool) -> Selection:
        """Keep this rank's best up to its own limit; always exact. No collective."""
        claims = self._claims
        keep_N, tied = select_top(claims.words, claims.pool_N, claims.limit_P)
        own_P = claims.by_pool(claims.count_codes()[: claims.num_experts])
        return Selection(keep_N, own_P.minimum(claims.limit_P), tied, None)
