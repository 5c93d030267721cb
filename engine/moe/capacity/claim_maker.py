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
from engine.moe.capacity.expansion import candidates
from engine.moe.capacity.limits import Pools, expert_capacity
from engine.moe.capacity.priority import sort_keys
from engine.moe.capacity.speed_weights import limits
from engine.moe.router import RouterSpec, Routing
from engine.moe.step import MoEStep
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
    ) -> None:
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
        slots = limits(self.pools, self.capacity(step.num_eligible), step.weights_W)
        most = step.num_eligible
        return any(
            limit < most * min(self._router.top_k, size)
            for limit, size in zip(slots, self.pools.sizes, strict=True)
        )

    def capacity(self, num_eligible: int) -> int:
        """Return C for so many tokens subject to capacity."""
        router = self._router
        return expert_capacity(
            self._config.exact_factor, num_eligible, router.top_k, router.num_experts
        )

    def make(self, routing: Routing, step: MoEStep) -> Claims:
        """Return this rank's claims in one call of the layer; no collective, no host sync."""
        num_experts, config = self._router.num_experts, self._config
        code_TN, score_TN = routing.topk_ids_TK, routing.scores_TE.gather(1, routing.topk_ids_TK)
        columns = self._router.top_k
        if step.eligible_T is not None:
            code_TN = code_TN + num_experts * (~step.eligible_T[:, None]).long()
        if self._extras_claim:
            extra_TX, score_TX = self._extra_claims(routing, step)
            code_TN = torch.cat((code_TN, extra_TX), dim=1)
            score_TN = torch.cat((score_TN, score_TX), dim=1)
            columns += self._most_local
        expert_N = None
        if any(size > 1 for size in self.pools.sizes):
            expert_N = code_TN.flatten() % num_experts
        keys, num_primary = sort_keys(
            config.order,
            score_N=score_TN.flatten(),
            request_N=_each(step.request_T, columns),
            position_N=_each(step.position_T, columns),
            expert_N=expert_N,
            seed=config.seed,
            layer=self._layer,
        )
        device = code_TN.device
        local = config.consensus == "local"
        return Claims(
            keys=keys,
            num_primary=num_primary,
            code_N=code_TN.flatten(),
            pool_of_code=self._table(device),
            limit_P=self._limit(
                device, step.num_own_eligible if local else step.num_eligible, step.weights_W
            ),
            non_finite=(~routing.scores_TE.isfinite().all()).long()[None],
            padded=max(step.num_tokens_W) * columns,
        )

    def _extra_claims(self, routing: Routing, step: MoEStep) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes [T, X], 3E for none, and scores [T, X] of extras that claim slots."""
        scores_Te = routing.scores_TE[:, self.own]
        num_tokens, num_local = scores_Te.shape
        allowed_Te = self.outside_topk(routing, step)
        budget = self._most_local if self._config.expand is None else self._config.expand
        wanted_Te = candidates(scores_Te, allowed_Te, budget)
        device, num_experts = scores_Te.device, self._router.num_experts
        nothing = 3 * num_experts
        codes_e = torch.arange(self.own.start, self.own.stop, device=device) + 2 * num_experts
        code_TX = torch.full((num_tokens, self._most_local), nothing, device=device)
        code_TX[:, :num_local] = codes_e.expand(num_tokens, -1).where(wanted_Te, nothing)
        score_TX = scores_Te.new_zeros((num_tokens, self._most_local))
        score_TX[:, :num_local] = scores_Te
        return code_TX, score_TX

    def outside_topk(self, routing: Routing, step: MoEStep) -> torch.Tensor:
        """Return which local experts each token subject to capacity has not chosen: bool [T, e]."""
        chosen_TE = torch.zeros_like(routing.scores_TE, dtype=torch.bool)
        outside_Te = ~chosen_TE.scatter_(1, routing.topk_ids_TK, True)[:, self.own]
        return outside_Te if step.eligible_T is None else outside_Te & step.eligible_T[:, None]

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


def _each(numbers_T: torch.Tensor, times: int) -> torch.Tensor:
    """Return each token's number once per claim: [T * times]."""
    return numbers_T[:, None].expand(-1, times).flatten()
