"""Quota consensus: every rank gets a quota of a pool's slots and fills it with its own best claims.

One all-gather of counts. Totals are those of global consensus exactly; the claims kept are nearly
the same where ranks have similar traffic.

Worked example: a pool of 5 slots, ranks with 4, 3 and 3 claims: 5 * 4 / 10 = 2, 1.5 and 1.5; one
slot is left and the remainders of ranks 1 and 2 are equal, so the lower one gets it: 2, 2, 1.

Legend: N claims of this rank, P pools, E experts, W ranks.
"""

from __future__ import annotations

import torch

from engine.distributed.collectives import Collectives
from engine.moe.capacity.consensus import Claims, PendingSelection, Selection
from engine.moe.capacity.limits import Pools
from engine.ops.select_top import quotas, select_top


class QuotaConsensus:
    """One all-gather of counts."""

    communicates = True

    def __init__(self, pools: Pools, collectives: Collectives) -> None:
        # The quota of a pool of several experts does not determine the rows of each.
        self._complete = self.counts_only = all(size == 1 for size in pools.sizes)
        self._collectives = collectives

    def begin(self, claims: Claims) -> PendingSelection:
        """Start gathering counts. Collective over the group."""
        return _PendingQuota(claims, self._collectives, self._complete)


class _PendingQuota:
    def __init__(self, claims: Claims, collectives: Collectives, complete: bool) -> None:
        self._claims, self._collectives, self.complete = claims, collectives, complete
        counts = torch.cat((claims.count_codes(), claims.non_finite)).to(torch.int32)
        self._pending = collectives.all_gather(counts)

    def wait(self) -> None:
        """Wait for the counts."""
        self._counts = self._pending.wait().long()

    def select(self, *, exact: bool) -> Selection:
        """Select this rank's best up to its quota; always exact. No collective."""
        claims, num_experts = self._claims, self._claims.num_experts
        non_finite_W1 = self._counts[:, -1:]
        before_WE, exempt_WE, extra_WE = self._counts[:, :-1].unflatten(1, (3, -1)).unbind(1)
        quota_WP = quotas(claims.by_pool(before_WE + extra_WE), claims.limit_P)
        keep_N, tied = select_top(claims.keys, claims.pool_N, quota_WP[self._collectives.rank])
        rows = None
        if self.complete:
            pool_E = claims.pool_of_code[:num_experts]
            kept_WE, chosen_WE = quota_WP[:, pool_E], before_WE + exempt_WE
            rows = torch.cat((kept_WE + exempt_WE, chosen_WE, non_finite_W1), dim=1)
        kept_P = claims.by_pool(before_WE.sum(0)).minimum(claims.limit_P)
        return Selection(keep_N, kept_P, tied, rows)
