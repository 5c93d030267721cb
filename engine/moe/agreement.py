"""Agreement: from one rank's routing to what is computed, decided alike on all ranks.

Step 3 of `layer.py` when a capacity policy is on. In order:

    claims     every competing assignment gets its order words              capacity.py
    consensus  overloaded pools are cut                                     consensus.py
    extras     Expanded Drop: this rank's free slots for its own tokens     expansion.py
    order      what is left, sorted by expert                               plan.py
    rows       every rank's row counts, copied to the host: the one sync of the layer

Equal claims at a cut are the exception that costs a second round; then all ranks see the same flag
and all go round again.

Legend: T tokens on this rank, K top-k, X extra columns (most experts on any rank), M columns of the
result (K, or K + e), N claims (T * K, or T * (K + X) when extras compete), E experts, e experts on
this rank, P pools, W expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.config import CapacityConfig
from engine.distributed.collectives import Collectives
from engine.moe.capacity import Pools, cannot_bind, expert_capacity, order_words
from engine.moe.consensus import Claims, Consensus, Verdict
from engine.moe.consensus_registry import make_consensus
from engine.moe.expansion import candidates, choose_extras
from engine.moe.overlap import ExpertLayout
from engine.moe.plan import ExpertOrder
from engine.moe.router import RouterSpec, Routing, score_weights
from engine.moe.step import MoEStep
from engine.profiling.phases import NoClock, Phase, PhaseClock


@dataclass(frozen=True, slots=True)
class Decision:
    """What this rank's tokens get, and every rank's counts.

    ids_TM: int64, the experts that will be computed: the top-k columns, -1 where dropped, then one
    column a local expert for extras, -1 where none. weights_TM: float32 combine weights, 0 where
    the id is -1. keep_TK: bool. extra_Te: bool, None without expansion. order: ids_TM sorted by
    expert. counts_WE: int64 on the host, rows each rank sends to each expert; the extras of other
    ranks, which stay there, may be missing. before_WE: top-k assignments before capacity.
    """

    ids_TM: torch.Tensor
    weights_TM: torch.Tensor
    keep_TK: torch.Tensor
    extra_Te: torch.Tensor | None
    order: ExpertOrder
    counts_WE: np.ndarray
    before_WE: np.ndarray


class CapacityAgreement:
    """Decides one MoE layer's drops and extras together with the other ranks.

    layout: which rank hosts which experts, and in which order their rows travel. ranks: what to
    call the group's ranks in errors, 0 .. W - 1 by default. Build it with the same arguments on
    every rank.
    """

    def __init__(
        self,
        router: RouterSpec,
        config: CapacityConfig,
        *,
        layer: int,
        layout: ExpertLayout,
        collectives: Collectives,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.config = config
        self.collectives = collectives
        self._router, self._layer = router, layer
        self._ranks = ranks or range(collectives.size)
        self._layout = layout
        first_experts = layout.first_experts
        self._own = slice(*first_experts[collectives.rank : collectives.rank + 2])
        self._most_local = max(
            end - start for start, end in zip(first_experts, first_experts[1:], strict=False)
        )
        self._binds = config.policy != "none" and not cannot_bind(
            config.exact_factor, router.top_k, router.num_experts
        )
        self._expands = config.policy == "expanded_drop" and config.expand != 0
        self._pools = Pools.make(config.scope, first_experts)
        self._consensus: Consensus = make_consensus(
            config.consensus, config.selection, self._pools, collectives
        )
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._limits: dict[tuple[torch.device, int], torch.Tensor] = {}

    def applies(self, step: MoEStep) -> bool:
        """Whether anything may be dropped or added in this step; the same on every rank."""
        if not self._binds or not step.num_competing:
            return False
        if self._expands or self.config.consensus == "local":
            return True
        # No expert can be chosen by more tokens than there are.
        return self._capacity(step.num_competing) < step.num_competing

    def decide(
        self,
        routing: Routing,
        step: MoEStep,
        *,
        clock: PhaseClock | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Decision:
        """Agree on this layer's drops and extras. Collective over EP: every rank must call.

        clock: told PLAN and, exactly once, CONSENSUS. meanwhile: work that needs no answer, done
        while the first collective is under way.

        Raises:
            ValueError: a router score is NaN or infinite on some rank; on every rank.
        """
        clock, consensus = clock or NoClock(), self._consensus
        clock.enter(Phase.PLAN)
        claims = self._claims(routing, step)
        if consensus.communicates and meanwhile is None:
            clock.enter(Phase.CONSENSUS)
        round = consensus.begin(claims)
        if meanwhile is not None:
            clock.enter(Phase.EXPERTS)
            meanwhile()
            clock.enter(Phase.CONSENSUS if consensus.communicates else Phase.PLAN)
        round.wait()
        if round.complete:
            clock.enter(Phase.PLAN)
        exact = False
        while True:
            verdict = round.verdict(exact=exact)
            keep_TK, extra_Te = self._apply(verdict, routing, step, claims)
            ids_TM = _merge(routing.topk_ids_TK, keep_TK, extra_Te, self._own.start)
            order = self._layout.sort(ids_TM)
            rows_WE2 = self._rows(verdict, claims, order, clock)
            # SYNC: all_to_all takes its splits as host integers; the layer's only copy. The flags
            # for ties and bad scores ride along.
            host = rows_WE2.cpu().numpy()
            self._check_finite(host[:, -2])
            if exact or not host[:, -1].any():
                break
            exact = True
        num_experts = self._router.num_experts
        return Decision(
            ids_TM=ids_TM,
            weights_TM=self._weights(routing, keep_TK, extra_Te),
            keep_TK=keep_TK,
            extra_Te=extra_Te,
            order=order,
            counts_WE=host[:, :num_experts],
            before_WE=host[:, num_experts : 2 * num_experts],
        )

    def _capacity(self, num_competing: int) -> int:
        router = self._router
        return expert_capacity(
            self.config.exact_factor, num_competing, router.top_k, router.num_experts
        )

    def _claims(self, routing: Routing, step: MoEStep) -> Claims:
        num_experts, config = self._router.num_experts, self.config
        code_TN, score_TN = routing.topk_ids_TK, routing.scores_TE.gather(1, routing.topk_ids_TK)
        columns = self._router.top_k
        if step.competes_T is not None:
            code_TN = code_TN + num_experts * (~step.competes_T[:, None]).long()
        if self._expands and config.tiers == "one":
            extra_TX, score_TX = self._competing_extras(routing, step)
            code_TN = torch.cat((code_TN, extra_TX), dim=1)
            score_TN = torch.cat((score_TN, score_TX), dim=1)
            columns += self._most_local
        expert_N = None
        if any(size > 1 for size in self._pools.sizes):
            expert_N = code_TN.flatten() % num_experts
        words, leading = order_words(
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
            words=words,
            leading=leading,
            code_N=code_TN.flatten(),
            pool_of_code=self._table(device)[0],
            limit_P=self._limit(device, step.num_own_competing if local else step.num_competing),
            bad=(~routing.scores_TE.isfinite().all()).long()[None],
            padded=max(step.num_tokens_W) * columns,
        )

    def _competing_extras(
        self, routing: Routing, step: MoEStep
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [T, X] and scores [T, X] of extras that compete with top-k; -1 pads to X."""
        scores_Te = routing.scores_TE[:, self._own]
        num_tokens, num_local = scores_Te.shape
        allowed_Te = self._outside_topk(routing, step)
        budget = self._most_local if self.config.expand is None else self.config.expand
        wanted_Te = candidates(scores_Te, allowed_Te, budget)
        device, num_experts = scores_Te.device, self._router.num_experts
        codes_e = torch.arange(self._own.start, self._own.stop, device=device) + 2 * num_experts
        code_TX = torch.full((num_tokens, self._most_local), -1, device=device)
        code_TX[:, :num_local] = codes_e.expand(num_tokens, -1).where(wanted_Te, -1)
        score_TX = scores_Te.new_zeros((num_tokens, self._most_local))
        score_TX[:, :num_local] = scores_Te
        return code_TX, score_TX

    def _apply(
        self, verdict: Verdict, routing: Routing, step: MoEStep, claims: Claims
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Turn the verdict into keep_TK and extra_Te."""
        num_tokens, top_k = routing.topk_ids_TK.shape
        keep_TN = verdict.keep_N.view(num_tokens, claims.code_N.numel() // max(num_tokens, 1))
        if not num_tokens:
            keep_TN = verdict.keep_N.view(0, top_k)
        keep_TK = keep_TN[:, :top_k]
        if step.competes_T is not None:
            keep_TK = keep_TK | ~step.competes_T[:, None]
        if not self._expands:
            return keep_TK, None
        num_local = self._own.stop - self._own.start
        if not num_tokens:
            return keep_TK, keep_TK.new_zeros((0, num_local))
        if self.config.tiers == "one":
            return keep_TK, keep_TN[:, top_k : top_k + num_local]
        free_P = claims.limit_P - verdict.pool_kept_P
        pool_e = claims.pool_of_code[self._own]
        allowed_Te = self._outside_topk(routing, step) & (free_P[pool_e] > 0)
        budget: torch.Tensor | int = num_local if self.config.expand is None else self.config.expand
        if self.config.extras == "dropped":
            budget = (~keep_TK).sum(1, keepdim=True).clamp(max=budget)
        scores_Te = routing.scores_TE[:, self._own]
        wanted_Te = candidates(scores_Te, allowed_Te, budget)
        return keep_TK, choose_extras(
            scores_Te, wanted_Te, pool_e, free_P, step.request_T, step.position_T
        )

    def _outside_topk(self, routing: Routing, step: MoEStep) -> torch.Tensor:
        """bool [T, e]: the local experts that a competing token has not chosen."""
        chosen_TE = torch.zeros_like(routing.scores_TE, dtype=torch.bool)
        outside_Te = ~chosen_TE.scatter_(1, routing.topk_ids_TK, True)[:, self._own]
        return outside_Te if step.competes_T is None else outside_Te & step.competes_T[:, None]

    def _rows(
        self, verdict: Verdict, claims: Claims, order: ExpertOrder, clock: PhaseClock
    ) -> torch.Tensor:
        """Every rank's numbers [W, 2E + 2]: rows to send, rows before capacity, bad, tied."""
        num_experts, rank = self._router.num_experts, self.collectives.rank
        tied = verdict.tied.long()
        if verdict.rows_WE2 is not None:
            rows_WE2 = verdict.rows_WE2
            rows_WE2[rank, :num_experts] = order.load_E  # with this rank's extras
            return torch.cat((rows_WE2, tied.expand(len(rows_WE2), 1)), dim=1)
        before_E = claims.count_codes()[: 2 * num_experts].view(2, num_experts).sum(0)
        own = torch.cat((order.load_E, before_E, claims.bad, tied[None]))
        if not self._consensus.communicates:
            clock.enter(Phase.CONSENSUS)
        gathered = self.collectives.all_gather(own).wait()
        clock.enter(Phase.PLAN)
        return gathered

    def _check_finite(self, bad_W: np.ndarray) -> None:
        names = [str(rank) for rank, bad in zip(self._ranks, bad_W, strict=True) if bad]
        if names:
            raise ValueError(
                f"layer {self._layer}: router scores are NaN or infinite on rank "
                f"{', '.join(names)}, so the best assignments are undefined; check the checkpoint "
                "and model.dtype (float16 overflows where bfloat16 does not), or set "
                "moe.capacity.policy=none, under which only the request concerned fails"
            )

    def _weights(
        self, routing: Routing, keep_TK: torch.Tensor, extra_Te: torch.Tensor | None
    ) -> torch.Tensor:
        weights_TK = routing.topk_weights_TK
        kept_TM = weights_TK.where(keep_TK, 0.0)
        if extra_Te is not None:
            extra_weights_Te = score_weights(
                routing.scores_TE[:, self._own],
                routing.scores_TE.gather(1, routing.topk_ids_TK),
                self._router,
            )
            kept_TM = torch.cat((kept_TM, extra_weights_Te.where(extra_Te, 0.0)), dim=1)
        if not self.config.renormalize:
            return kept_TM
        changed_T1 = (~keep_TK).any(1, keepdim=True)
        if extra_Te is not None:
            changed_T1 = changed_T1 | extra_Te.any(1, keepdim=True)
        kept_T1 = kept_TM.sum(1, keepdim=True)
        changed_T1 = changed_T1 & (kept_T1 > 0)
        # Shares first: the old sum over a tiny new one would overflow.
        rescaled_TM = kept_TM / kept_T1 * weights_TK.sum(1, keepdim=True)
        return rescaled_TM.where(changed_T1, kept_TM)

    def _table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The pool of every code, int64 [3E + 1], and the experts in each pool, int64 [P]."""
        if device not in self._tables:
            pools = list(self._pools.pool_of_expert)
            codes = [*pools, *([-1] * len(pools)), *pools, -1]
            self._tables[device] = (
                torch.tensor(codes, device=device),
                torch.tensor(self._pools.sizes, device=device),
            )
        return self._tables[device]

    def _limit(self, device: torch.device, num_competing: int) -> torch.Tensor:
        """Slots of every pool, int64 [P]; kept for the next layer call with as many tokens."""
        capacity = self._capacity(num_competing)
        if (device, capacity) not in self._limits:
            self._limits = {(device, capacity): self._table(device)[1] * capacity}
        return self._limits[device, capacity]


def _each(numbers_T: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat each token's number for its claims: [T * times]."""
    return numbers_T[:, None].expand(-1, times).flatten()


def _merge(
    topk_ids_TK: torch.Tensor,
    keep_TK: torch.Tensor,
    extra_Te: torch.Tensor | None,
    first_expert: int,
) -> torch.Tensor:
    """ids_TM: surviving top-k, then extras in the order of the local experts; -1 elsewhere."""
    ids_TK = topk_ids_TK.where(keep_TK, -1)
    if extra_Te is None:
        return ids_TK
    local_e = torch.arange(extra_Te.shape[1], device=ids_TK.device) + first_expert
    return torch.cat((ids_TK, local_e.expand_as(extra_Te).where(extra_Te, -1)), dim=1)
