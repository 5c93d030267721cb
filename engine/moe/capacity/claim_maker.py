"""Claim maker: a rank's routing as claims on pools, with their sort keys and the pools' limits.

The first part of `agreement.py`: which of the rank's assignments are subject to capacity, by which
keys, in which pools, for how many slots.

Legend: T tokens on this rank, K top-k, X extra columns (most experts on any rank), N claims (T * K,
or T * (K + X) when extras are claims), E experts, e experts on this rank, P pools.
"""

from __future__ import annotations

import torch

from engine.config import CapacityConfig
from engine.moe.capacity.consensus import Claims
from engine.moe.capacity.limits import Pools, expert_capacity
from engine.moe.capacity.speed_weights import limits, rank_limits
from engine.moe.router import RouterSpec, Routing
from engine.moe.step import MoEStep
from engine.ops.claim_keys import num_primary_keys
from engine.ops.claims import ClaimRule, ExtraRule, extra_claims, make_claims
from engine.ops.to_device import to_device

_LimitKey = tuple[torch.device, int, tuple[int, ...] | None]


class ClaimMaker:
    """Makes one layer's claims of one rank."""

    def __init__(
        self,
        router: RouterSpec,
        config: CapacityConfig,
        *,
        layer: int,
        first_experts: list[int],
        rank: int,
        has_copies: bool = False,
    ) -> None:
        self._has_copies = has_copies
        self.own = slice(*first_experts[rank : rank + 2])  # the experts that this rank hosts
        self.pools = Pools.make(config.scope, first_experts)
        self._router, self._config, self._layer = router, config, layer
        self._most_local = max(
            end - start for start, end in zip(first_experts, first_experts[1:], strict=False)
        )
        self._extras_claim = (
            config.policy == "expanded_drop" and config.expand != 0 and config.tiers == "one"
        )
        self._tables: dict[torch.device, torch.Tensor] = {}
        self._limits: dict[_LimitKey, torch.Tensor] = {}

    def may_bind(self, step: MoEStep) -> bool:
        """Return whether some pool may have more claims than slots."""
        most = step.num_eligible
        if self._has_copies and self._config.scope == "rank":
            # A rank may have to compute all claims: its experts' and those that copies take.
            slots = self.rank_limits(step)
            return any(limit < most * self._router.top_k for limit in slots)
        slots = limits(self.pools, self.capacity(most), step.weights_W)
        return any(
            limit < most * min(self._router.top_k, size)
            for limit, size in zip(slots, self.pools.sizes, strict=True)
        )

    def capacity(self, num_eligible: int) -> int:
        """Return C for so many tokens subject to capacity: gamma times the mean load, where zero
        experts take their share of it.
        """
        router = self._router
        return expert_capacity(
            self._config.exact_factor, num_eligible, router.top_k, router.num_logits
        )

    def rank_limits(self, step: MoEStep) -> list[int]:
        """Return the claims that each rank may keep where ranks share all slots (with copies)."""
        slots = self._router.num_experts * self.capacity(step.num_eligible)
        return rank_limits(slots, len(self.pools.sizes), step.weights_W)

    def make(self, routing: Routing, step: MoEStep) -> Claims:
        """Return this rank's claims in one call of the layer; no collective, no host sync."""
        config, columns, extra_pool_Te = self._config, self._router.top_k, None
        device = routing.topk_ids_TK.device
        if self._extras_claim:
            extra_pool_Te = self._extra_pools(routing, step)
            columns += self._most_local
        rule = ClaimRule(
            order=config.order,
            seed=config.seed,
            layer=self._layer,
            with_expert=self._has_copies or any(size > 1 for size in self.pools.sizes),
            num_extra=self._most_local,
            first_expert=self.own.start,
            some_none=self._router.num_zero_experts > 0,
        )
        keys, code_N, non_finite = make_claims(
            routing.scores_TE,
            routing.topk_ids_TK,
            step.request_T,
            step.position_T,
            rule,
            step.eligible_T,
            extra_pool_Te,
        )
        local = config.consensus == "local"
        return Claims(
            keys=keys,
            num_primary=num_primary_keys(config.order),
            code_N=code_N,
            pool_of_code=self._table(device),
            limit_P=self._limit(
                device, step.num_own_eligible if local else step.num_eligible, step.weights_W
            ),
            non_finite=non_finite,
            padded=max(step.num_tokens_W) * columns,
        )

    def _extra_pools(self, routing: Routing, step: MoEStep) -> torch.Tensor:
        """Return the pools of extras that claim slots, int64 [T, e], -1 for none."""
        budget = self._most_local if self._config.expand is None else self._config.expand
        pool_Te, _ = extra_claims(
            routing.scores_TE,
            routing.topk_ids_TK,
            step.request_T,
            step.position_T,
            self._table(routing.topk_ids_TK.device)[self.own],
            ExtraRule(
                self.own.start,
                budget,
                with_keys=False,
                some_none=self._router.num_zero_experts > 0,
            ),
            step.eligible_T,
        )
        return pool_Te

    def _table(self, device: torch.device) -> torch.Tensor:
        """Return the pool of every code, int64 [3E + 1]."""
        if device not in self._tables:
            pools = list(self.pools.pool_of_expert)
            codes = [*pools, *([-1] * len(pools)), *pools, -1]
            self._tables[device] = to_device(torch.tensor(codes), device)
        return self._tables[device]

    def _limit(
        self, device: torch.device, num_eligible: int, weights_W: tuple[int, ...] | None
    ) -> torch.Tensor:
        """Return the slots of every pool, int64 [P]; kept for calls with as many tokens."""
        capacity = self.capacity(num_eligible)
        key = (device, capacity, weights_W)
        if key not in self._limits:
            limit_P = torch.tensor(limits(self.pools, capacity, weights_W))
            self._limits = {key: to_device(limit_P, device)}
        return self._limits[key]
