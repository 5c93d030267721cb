"""Capacity gate: capacity between another framework's router and its dispatcher.

Takes the router's choice as weights and a mask, returns both after capacity: `CapacityAgreement`
decides with the other ranks which assignments are dropped and added, as in the engine's own layer.
Independent of the framework; `megatron_router.py` adapts it to Megatron-Core.

Worked example, one rank, Token Drop, K = 1, E = 2, T = 4, gamma = 1, so C = 4 * 1 / 2 = 2:
    scores_TE  .9 .1 | .8 .2 | .7 .3 | .4 .6     expert 0 is chosen by t0, t1, t2 and keeps t0, t1
    out        t2 gets weight 0 and no expert; t0, t1 and t3 keep theirs, bit for bit

Legend: T tokens on this rank, t those without padding, E experts, K top-k, M columns of the
decision.
"""

from __future__ import annotations

import torch

from engine.config import CapacityConfig
from engine.config.world_rules import validate_capacity
from engine.distributed.collectives import GroupCollectives
from engine.distributed.groups import Group, expert_range
from engine.moe.capacity.agreement import CapacityAgreement
from engine.moe.capacity.decision import Decision
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.router import RouterSpec, Routing
from engine.moe.stats import DropStats
from engine.moe.step import MoEStep


class CapacityGate:
    """One layer's capacity.

    Rank w of the group has the experts that `expert_range` assigns to it.
    """

    def __init__(
        self, spec: RouterSpec, config: CapacityConfig, *, group: Group, layer: int
    ) -> None:
        """Build it, with the same arguments on every rank; no collective.

        Raises:
            ValueError: settings that do not fit this number of experts or ranks.
        """
        num_experts, size = spec.num_experts, group.size
        validate_capacity(config, num_experts=num_experts, top_k=spec.top_k, expert_ranks=size)
        starts = [expert_range(num_experts, size, rank)[0] for rank in range(size)]
        self._top_k = spec.top_k
        self._collectives = GroupCollectives(group)
        self._agreement = CapacityAgreement(
            spec,
            config,
            layer=layer,
            layout=ExpertLayout([*starts, num_experts], 1),
            collectives=self._collectives,
            ranks=group.ranks,
        )
        self.drops = DropStats()  # what the last call did to this rank's tokens

    def apply(
        self,
        scores_TE: torch.Tensor,
        weights_TE: torch.Tensor,
        chosen_TE: torch.Tensor,
        padding_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return combine weights [T, E] and assignments, bool [T, E], after capacity.

        Args:
            scores_TE: float32, not negative.
            weights_TE: combine weights of the chosen experts, any float dtype; gradients are kept.
            chosen_TE: bool, K experts per token that is no padding.
            padding_T: bool, True for padding, which gets no expert.

        Collective over the group: every rank must call, T may be 0.

        Raises:
            ValueError: a score is NaN or infinite on some rank; on every rank.
        """
        if padding_T is None:
            return self._apply(scores_TE, weights_TE, chosen_TE)
        # SYNC: the number of tokens decides the shapes of all that follows.
        real_t = (~padding_T).nonzero().flatten()
        weights_tE, kept_tE = self._apply(scores_TE[real_t], weights_TE[real_t], chosen_TE[real_t])
        return (
            torch.zeros_like(weights_TE).index_copy(0, real_t, weights_tE),
            torch.zeros_like(chosen_TE).index_copy(0, real_t, kept_tE),
        )

    def _apply(
        self, scores_TE: torch.Tensor, weights_TE: torch.Tensor, chosen_TE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = self._step(scores_TE)
        # -1 is below every score, so these are the chosen experts, best first.
        ids_TK = scores_TE.where(chosen_TE, -1.0).topk(self._top_k, dim=1).indices
        weights_TK = weights_TE.gather(1, ids_TK)
        # Sums in half precision would be coarse; to float32 and back is exact.
        weights_TK = weights_TK.to(torch.promote_types(weights_TK.dtype, torch.float32))
        routing = Routing(scores_TE, ids_TK, weights_TK)
        decision = self._agreement.decide(routing, step) if self._agreement.applies(step) else None
        self.drops = DropStats()
        with torch.no_grad():
            self.drops.add(routing, decision, step)
        return (weights_TE, chosen_TE) if decision is None else _spread(decision, weights_TE)

    def _step(self, scores_TE: torch.Tensor) -> MoEStep:
        """Return this call's tokens, numbered across the ranks of the group. Collective."""
        num_tokens, rank, device = scores_TE.shape[0], self._collectives.rank, scores_TE.device
        counts = [num_tokens]
        if self._collectives.size > 1:
            own = torch.tensor([num_tokens], device=device)
            # SYNC: the shapes of the agreement's collectives follow from every rank's tokens.
            counts = self._collectives.all_gather(own).wait().flatten().tolist()
        first = sum(counts[:rank])
        position_T = torch.arange(first, first + num_tokens, dtype=torch.int32, device=device)
        return MoEStep.whole(torch.zeros_like(position_T), position_T, tuple(counts))


def _spread(decision: Decision, weights_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the decision's columns as weights and a mask over all experts."""
    num_tokens, num_experts = weights_TE.shape
    # Dropped assignments go to an extra column after the last expert, which is cut off.
    column_TM = decision.ids_TM.where(decision.ids_TM >= 0, num_experts)
    weights_TM = decision.weights_TM.to(weights_TE.dtype)
    weights = weights_TE.new_zeros((num_tokens, num_experts + 1)).scatter(1, column_TM, weights_TM)
    kept = torch.zeros_like(weights, dtype=torch.bool).scatter(1, column_TM, True)
    return weights[:, :-1].contiguous(), kept[:, :-1].contiguous()
