"""Decisions: what a layer of the engine would do with given loads, by the engine's own functions.

Limits come from `ClaimMaker`, the cut and the split from `engine.ops.split`, which rows of a source
rank go to which instance from `RowSplit`, quotas from `engine.ops.select_top`. Only counts are
needed, except where the order of claims matters (`claims.py` has it from a recording):

    exact        rows of every rank without copies; with copies and no drop, or scope expert
    a draw       scope rank with copies: the order of the claims is drawn from a seed
    in proportion  of several experts that share a limit, how much each loses; and how much each
                 source rank loses of an expert

Legend: E experts in home order, I instances, P pools, W expert-parallel ranks, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.config import CapacityConfig
from engine.moe.capacity.claim_maker import ClaimMaker
from engine.moe.capacity.limits import cannot_bind
from engine.moe.capacity.speed_weights import limits
from engine.moe.placement.instances import Instances
from engine.moe.placement.row_split import RowSplit, SplitRule
from engine.moe.router import RouterSpec
from engine.moe.step import MoEStep
from engine.ops.select_top import quotas
from engine.ops.split import cut


@dataclass(frozen=True, slots=True)
class Decided:
    """One layer of one step of one expert-parallel group."""

    counts_WI: np.ndarray  # int64, rows of each source rank for each instance
    routed: int  # assignments subject to capacity
    dropped: int  # of them
    is_exact: bool  # whether the rows of every rank are those of the engine for certain


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """One layer's assignments."""

    claims_WE: np.ndarray  # int64, of tokens subject to capacity, by source rank
    exempt_WE: np.ndarray  # int64, of the others
    tokens_W: tuple[int, ...]  # all tokens
    eligible_W: tuple[int, ...]  # those subject to capacity

    def as_step(self, rank: int = 0) -> MoEStep:
        """Return the step as the engine's decisions take it, without tokens."""
        none_T = torch.empty(0, dtype=torch.int32)
        return MoEStep(
            request_T=none_T,
            position_T=none_T,
            eligible_T=None,
            num_own_eligible=self.eligible_W[rank],
            num_tokens_W=self.tokens_W,
            num_eligible=sum(self.eligible_W),
        )


class LayerRules:
    """The decisions of one layer.

    Args:
        capacity: moe.capacity; token_drop or none.
        instances: of the layer.
        rule: of the split.
        layer: its number.
        top_k: K.
        num_zero_experts: that the router may choose besides.
    """

    def __init__(
        self,
        capacity: CapacityConfig,
        instances: Instances,
        rule: SplitRule,
        *,
        layer: int,
        top_k: int,
        num_zero_experts: int = 0,
    ) -> None:
        self.capacity, self.instances, self.layer = capacity, instances, layer
        self.split = RowSplit(instances, rule)
        self.router = RouterSpec(
            num_experts=instances.num_experts, top_k=top_k, num_zero_experts=num_zero_experts
        )
        self.maker = self.claim_maker(0)
        self._seed = layer

    def claim_maker(self, rank: int) -> ClaimMaker:
        """Return what makes a rank's claims."""
        return ClaimMaker(
            self.router,
            self.capacity,
            layer=self.layer,
            first_experts=self.instances.first_homes,
            rank=rank,
            has_copies=self.instances.has_copies,
        )

    def binds(self, step: MoEStep) -> bool:
        """Return whether the capacity policy may drop something in a step."""
        config = self.capacity
        if config.policy == "none" or not step.num_eligible:
            return False
        if cannot_bind(config.exact_factor, self.router.top_k, self.router.num_logits):
            return False
        return config.consensus == "local" or self.maker.may_bind(step)

    def decide(self, counts: StepCounts) -> Decided:
        """Return where the rows go."""
        instances, split = self.instances, self.split
        step, claims_WE = counts.as_step(), counts.claims_WE
        if not self.binds(step):
            if split.rule.low_bit:
                return self._placed(counts, claims_WE, None, True)
            loads_WE = claims_WE + counts.exempt_WE
            rows_I = split.rows(loads_WE.sum(0))
            return Decided(split.deal(loads_WE, rows_I), int(claims_WE.sum()), 0, True)
        if self.capacity.consensus != "global":
            return self._placed(counts, self._kept_by_rank(counts), None, True)
        claims_E = claims_WE.sum(0)
        limit_W, is_exact = None, True
        if not instances.has_copies:
            limit_P = np.array(limits(self.maker.pools, self._size(step), None))
            kept_E = self._from_pools(claims_E[None], limit_P)[0]
        elif self.capacity.scope == "expert":
            kept_E = np.minimum(claims_E, self._size(step))
        else:
            limit_W = np.array(self.maker.rank_limits(step), dtype=np.int64)
            order_N = np.repeat(np.arange(len(claims_E), dtype=np.int32), claims_E)
            order_N = np.random.default_rng(self._seed).permutation(order_N)
            kept_E, is_exact = cut(order_N, split.hosts, limit_W), False
        kept_WE = _quotas(claims_WE, kept_E)
        return self._placed(counts, kept_WE, limit_W, is_exact)

    def _size(self, step: MoEStep) -> int:
        return self.maker.capacity(step.num_eligible)

    def _placed(
        self,
        counts: StepCounts,
        kept_WE: np.ndarray,
        limit_W: np.ndarray | None,
        is_exact: bool,
    ) -> Decided:
        """Split what is kept; exempt rows stay at home."""
        instances, split = self.instances, self.split
        base_W = np.zeros(instances.num_ranks, np.int64)
        home_I = instances.home_instance_E
        np.add.at(base_W, instances.rank_I[home_I], counts.exempt_WE.sum(0))
        rows_I = split.rows(kept_WE.sum(0), base_W=base_W, limit_W=limit_W)
        counts_WI = split.deal(kept_WE, rows_I)
        counts_WI[:, home_I] += counts.exempt_WE
        routed = int(counts.claims_WE.sum())
        return Decided(counts_WI, routed, routed - int(kept_WE.sum()), is_exact)

    def _kept_by_rank(self, counts: StepCounts) -> np.ndarray:
        """Return what consensus local or quota keeps, int64 [W, E]."""
        claims_WE, pools = counts.claims_WE, self.maker.pools
        if self.capacity.consensus == "local":
            return np.concatenate(
                [
                    self._from_pools(
                        own_E[None], np.array(limits(pools, self.maker.capacity(eligible), None))
                    )
                    for own_E, eligible in zip(claims_WE, counts.eligible_W, strict=True)
                ]
            )
        claims_WP = self._by_pool(claims_WE)
        limit_P = np.array(limits(pools, self._size(counts.as_step()), None))
        quota_WP = _quotas(claims_WP, limit_P)
        return np.concatenate(
            [
                self._from_pools(own_E[None], quota_P)
                for own_E, quota_P in zip(claims_WE, quota_WP, strict=True)
            ]
        )

    def _by_pool(self, claims_WE: np.ndarray) -> np.ndarray:
        pools = self.maker.pools
        claims_WP = np.zeros((len(claims_WE), len(pools.sizes)), dtype=np.int64)
        np.add.at(claims_WP.T, np.array(pools.pool_of_expert), claims_WE.T)
        return claims_WP

    def _from_pools(self, claims_1E: np.ndarray, limit_P: np.ndarray) -> np.ndarray:
        """Return what is kept of each expert within the limits of pools, in proportion, [1, E]."""
        pool_E = np.array(self.maker.pools.pool_of_expert)
        if len(limit_P) == len(pool_E):
            return np.minimum(claims_1E, limit_P)
        claims_EP = np.zeros((len(pool_E), len(limit_P)), dtype=np.int64)
        claims_EP[np.arange(len(pool_E)), pool_E] = claims_1E[0]
        return _quotas(claims_EP, limit_P).sum(1)[None]


def _quotas(claims_WP: np.ndarray, limit_P: np.ndarray) -> np.ndarray:
    return quotas(torch.from_numpy(claims_WP), torch.from_numpy(limit_P)).numpy()
