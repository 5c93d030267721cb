"""Quota consensus: every rank gets its share of a pool's slots and fills it with its own best.

One all-gather of counts. Totals are those of global consensus exactly; which claims stay is nearly
the same where ranks see alike traffic.

Worked example: a pool of 5 slots, ranks with 4, 3 and 3 claims: 5 * 4 / 10 = 2, 1.5 and 1.5; one
slot is left and the remainders of ranks 1 and 2 are equal, so the lower one gets it: 2, 2, 1.

Legend: N claims of this rank, P pools, E experts, W ranks.
"""

from __future__ import annotations

import torch

from engine.distributed.collectives import Collectives
from engine.moe.capacity.consensus import Claims, PendingSelection, Selection
from engine.moe.capacity.limits import Pools
from engine.ops.select_top import select_top


def shares(claims_WP: torch.Tensor, limit_P: torch.Tensor) -> torch.Tensor:
    """Deal min(claims, limit) slots of each pool out in proportion to the ranks' claims: int64
    [W, P].

    claims_WP, limit_P: int64. Largest remainder, ties to the lower rank; exact integers.
    """
    total_P = claims_WP.sum(0)
    slots_P = total_P.minimum(limit_P)
    scaled_WP = claims_WP * slots_P
    divisor_P = total_P.clamp(min=1)
    share_WP = scaled_WP.div(divisor_P, rounding_mode="floor")
    left_P = slots_P - share_WP.sum(0)
    order_WP = (scaled_WP % divisor_P).argsort(dim=0, descending=True, stable=True)
    ranks_WP = torch.arange(len(claims_WP), device=claims_WP.device)[:, None].expand_as(order_WP)
    place_WP = torch.empty_like(order_WP).scatter_(0, order_WP, ranks_WP)
    return share_WP + (place_WP < left_P)


class QuotaConsensus:
    """One all-gather of counts."""

    communicates = True

    def __init__(self, pools: Pools, collectives: Collectives) -> None:
        # A share of a pool of several experts does not say which of them its rows are for.
        self._complete = self.counts_only = all(size == 1 for size in pools.sizes)
        self._collectives = collectives

    def begin(self, claims: Claims) -> PendingSelection:
        """Start gathering counts. Collective over the group."""
        return _PendingQuota(claims, self._collectives, self._complete)


class _PendingQuota:
    def __init__(self, claims: Claims, collectives: Collectives, complete: bool) -> None:
        self._claims, self._collectives, self.complete = claims, collectives, complete
        counts = torch.cat((claims.count_codes(), claims.bad)).to(torch.int32)
        self._pending = collectives.all_gather(counts)

    def wait(self) -> None:
        """Let the counts arrive."""
        self._counts = self._pending.wait().long()

    def verdict(self, *, exact: bool) -> Selection:
        """Keep this rank's best, as many as its share; always exact. No collective."""
        claims, num_experts = self._claims, self._claims.num_experts
        bad_W1 = self._counts[:, -1:]
        before_WE, passes_WE, extra_WE = self._counts[:, :-1].unflatten(1, (3, -1)).unbind(1)
        share_WP = shares(claims.by_pool(before_WE + extra_WE), claims.limit_P)
        keep_N, tied = select_top(claims.words, claims.pool_N, share_WP[self._collectives.rank])
        rows = None
        if self.complete:
            pool_E = claims.pool_of_code[:num_experts]
            kept_WE, chosen_WE = share_WP[:, pool_E], before_WE + passes_WE
            rows = torch.cat((kept_WE + passes_WE, chosen_WE, bad_W1), dim=1)
        kept_P = claims.by_pool(before_WE.sum(0)).minimum(claims.limit_P)
        return Selection(keep_N, kept_P, tied, rows)
