"""Claims: decisions from recorded claims, token by token, where the order of claims matters.

The engine's own selection over all ranks' claims, without other ranks: every rank's claims are
made, and the gather that each rank would wait for returns them all.

Legend: T tokens, K top-k, E experts, W expert-parallel ranks, N tokens of a rank.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from engine.distributed.collectives import COLLECTIVE_BYTES
from engine.moe.capacity.claim_split import Limits, split_claims
from engine.moe.capacity.consensus_global import GatherConsensus, GatheredClaims
from engine.moe.router import Routing
from engine.moe.step import MoEStep
from engine.profiling.routing.claim_log import LayerClaims
from engine.simulate.decisions import Decided, LayerRules, StepCounts


class _SharedGather:
    """`Collectives` of all ranks in turn: a gather returns the parts that all have given."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size
        self.bytes_sent = self.num_collectives = 0
        self.collective_bytes: float = COLLECTIVE_BYTES
        self._parts: list[torch.Tensor] = []

    def all_gather(self, part: torch.Tensor) -> _SharedGather:
        """Keep a rank's part."""
        self._parts.append(part)
        return self

    def all_reduce(self, part: torch.Tensor) -> _SharedGather:
        """Refuse: nothing here sums."""
        raise AssertionError("the claims of all ranks are gathered, not summed")

    def wait(self) -> torch.Tensor:
        """Return the parts of all ranks."""
        assert len(self._parts) == self.size, "not every rank has given its part"
        return torch.stack(self._parts)


def rank_of_tokens(
    claims: LayerClaims, ranks_T: np.ndarray, recorded: int, num_ranks: int, first: int
) -> np.ndarray:
    """Return the rank of each token of a group of num_ranks: as recorded, or in equal blocks."""
    if recorded == num_ranks:
        return ranks_T - first
    count = len(claims.request_T)
    return np.arange(count) * num_ranks // max(count, 1)


def counts_of(
    claims: LayerClaims, rank_T: np.ndarray, rules: LayerRules, *, competes: bool
) -> StepCounts:
    """Return the counts of recorded claims.

    competes: whether the recorded tokens subject to capacity are; otherwise all are.
    """
    instances = rules.instances
    num_ranks, num_experts = instances.num_ranks, instances.num_experts
    eligible_T = claims.eligible_T if competes else np.ones(len(rank_T), dtype=bool)

    def loads(tokens_T: np.ndarray) -> np.ndarray:
        ids_NK = claims.topk_ids_TK[tokens_T]
        cell_NK = rank_T[tokens_T][:, None] * num_experts + instances.home_order_E[ids_NK]
        found = np.bincount(cell_NK[ids_NK >= 0], minlength=num_ranks * num_experts)
        return found.reshape(num_ranks, num_experts).astype(np.int64)

    return StepCounts(
        claims_WE=loads(eligible_T),
        exempt_WE=loads(~eligible_T),
        tokens_W=tuple(np.bincount(rank_T, minlength=num_ranks).tolist()),
        eligible_W=tuple(np.bincount(rank_T[eligible_T], minlength=num_ranks).tolist()),
    )


@torch.inference_mode()
def decide_claims(
    rules: LayerRules, claims: LayerClaims, rank_T: np.ndarray, counts: StepCounts, competes: bool
) -> Decided:
    """Return where the rows of recorded claims go; consensus global, in a step that binds."""
    instances = rules.instances
    collectives = _SharedGather(instances.num_ranks)
    gathered = []
    for rank in range(instances.num_ranks):
        routing, step = _of_rank(rules, claims, rank_T == rank, counts, rank, competes)
        made = rules.claim_maker(rank).make(routing, step)
        made = replace(made, num_primary=len(made.keys))
        if instances.has_copies:
            gathered.append(GatheredClaims(made, collectives))
        else:
            gathered.append(GatherConsensus(collectives).begin(made))
    first, step = gathered[0], counts.as_step()
    first.wait()
    routed = int(counts.claims_WE.sum())
    if instances.has_copies:
        if rules.capacity.scope == "expert":
            bounds = Limits(capacity=rules.maker.capacity(step.num_eligible))
        else:
            bounds = Limits(rank_W=np.array(rules.maker.rank_limits(step), dtype=np.int64))
        counts_WI = split_claims(first, rules.split, bounds).counts_WI.numpy()
    else:
        rows_WE2 = first.select(exact=False).rows_WE2
        counts_WI = rows_WE2[:, : instances.num_experts].numpy()
    kept = int(counts_WI.sum() - counts.exempt_WE.sum())
    return Decided(counts_WI, routed, routed - kept, True)


def _of_rank(
    rules: LayerRules,
    claims: LayerClaims,
    is_own_T: np.ndarray,
    counts: StepCounts,
    rank: int,
    competes: bool,
) -> tuple[Routing, MoEStep]:
    """Return a rank's routing in home order, and its step."""
    ids_NK = claims.topk_ids_TK[is_own_T].astype(np.int64)
    ids_NK = np.where(ids_NK >= 0, rules.instances.home_order_E[ids_NK], -1)
    scores_NK = np.where(ids_NK >= 0, claims.scores_TK[is_own_T], 0.0).astype(np.float32)
    ids, scores = torch.from_numpy(ids_NK), torch.from_numpy(scores_NK)
    scores_NE = torch.zeros(len(ids), rules.router.num_experts + 1)
    scores_NE.scatter_(1, ids.where(ids >= 0, rules.router.num_experts), scores)
    request_N, position_N = claims.request_T[is_own_T], claims.position_T[is_own_T]
    if (request_N < 0).any():  # recorded without a policy: the order of the recording
        request_N = np.flatnonzero(is_own_T).astype(np.int32)
        position_N = np.zeros_like(request_N)
    step = replace(
        counts.as_step(rank),
        request_T=torch.from_numpy(request_N.copy()),
        position_T=torch.from_numpy(position_N.copy()),
        eligible_T=torch.from_numpy(claims.eligible_T[is_own_T].copy()) if competes else None,
    )
    return Routing(scores_NE[:, :-1].contiguous(), ids, scores), step
