"""Agreement: from one rank's routing to what is computed, decided alike on all ranks.

Step 3 of `layer.py` when a capacity policy is on. In order:

    claims     every competing assignment gets its order words              claims.py
    consensus  overloaded pools are cut                                     consensus.py
    extras     Expanded Drop: this rank's free slots for its own tokens     expansion.py
    order      what is left, sorted by expert                               plan.py
    rows       every rank's row counts, copied to the host: the one sync of the layer; where the
               layout needs more than loads, from the claims of all ranks (`global` by gather), by
               one more exchange (`quota` with scope `expert`), else in the exchange of the rows

Equal claims at a cut are the exception that costs a second round; then all ranks see the same flag
and all go round again.

Legend: T tokens on this rank, K top-k, M columns of the result (K, or K + e), N columns that
compete, E experts, e experts on this rank, P pools, W expert-parallel ranks, n numbers of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.config import CapacityConfig
from engine.distributed.collectives import Collectives, run_overlapped
from engine.moe.capacity.claim_maker import ClaimMaker
from engine.moe.capacity.consensus import Claims, Consensus, Selection
from engine.moe.capacity.consensus_registry import make_consensus
from engine.moe.capacity.expansion import candidates, choose_extras
from engine.moe.capacity.limits import cannot_bind
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.plan import ExpertOrder
from engine.moe.router import RouterSpec, Routing, score_weights
from engine.moe.step import MoEStep
from engine.profiling.device_clocks import NoClock
from engine.profiling.phase_clock import Phase, PhaseClock


@dataclass(frozen=True, slots=True)
class Decision:
    """What this rank's tokens get, and every rank's counts.

    ids_TM: int64, the experts that will be computed: the top-k columns, -1 where dropped, then one
    column a local expert for extras, -1 where none. weights_TM: float32 combine weights, 0 where
    the id is -1. keep_TK: bool. extra_Te: bool, None without expansion. order: ids_TM sorted by
    expert. exchanged_Wn: int64 on the host, `ExpertOrder.numbers` of every rank; the extras of
    other ranks, which stay there, may be missing. counts_WE: rows each rank sends to each expert,
    the same way. before_WE: top-k assignments before capacity.
    """

    ids_TM: torch.Tensor
    weights_TM: torch.Tensor
    keep_TK: torch.Tensor
    extra_Te: torch.Tensor | None
    order: ExpertOrder
    exchanged_Wn: np.ndarray
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
        self._claims = ClaimMaker(
            router,
            config,
            layer=layer,
            first_experts=layout.first_experts,
            rank=collectives.rank,
        )
        self._own = self._claims.own
        self._binds = config.policy != "none" and not cannot_bind(
            config.exact_factor, router.top_k, router.num_experts
        )
        self._expands = config.policy == "expanded_drop" and config.expand != 0
        self._consensus: Consensus = make_consensus(
            config.consensus, config.selection, self._claims.pools, collectives
        )

    def applies(self, step: MoEStep) -> bool:
        """Whether anything may be dropped or added in this step; the same on every rank."""
        if not self._binds or not step.num_competing:
            return False
        if self._expands or self.config.consensus == "local":
            return True
        return self._claims.may_bind(step)

    def costs_exchange(self, step: MoEStep | None) -> bool:
        """Whether a layout that tells more than loads by expert costs one more collective in this
        step; the same on every rank.
        """
        return step is not None and self._consensus.counts_only and self.applies(step)

    def decide(
        self,
        routing: Routing,
        step: MoEStep,
        *,
        clock: PhaseClock | None = None,
        meanwhile: Callable[[], None] | None = None,
        layout: ExpertLayout | None = None,
    ) -> Decision:
        """Agree on this layer's drops and extras. Collective over EP: every rank must call.

        clock: told PLAN and, exactly once, CONSENSUS. meanwhile: work that needs no answer, done
        while the first collective is under way. layout: the order of travel in this call, the same
        on every rank; by default the one given at the start.

        Raises:
            ValueError: a router score is NaN or infinite on some rank; on every rank.
        """
        clock, consensus = clock or NoClock(), self._consensus
        layout = layout or self._layout
        layer, sent = self._layer, self.collectives.bytes_sent
        clock.enter(Phase.PLAN, layer)
        claims = self._claims.make(routing, step)
        started = None
        if consensus.communicates:
            if meanwhile is None:
                clock.enter_collective(Phase.CONSENSUS, layer)
            else:
                started = clock.record_arrival()
        round = consensus.begin(claims)
        if meanwhile is not None:
            clock.enter(Phase.EXPERTS, layer)
            run_overlapped(meanwhile, round.wait)
            if started is not None:
                clock.enter_collective(Phase.CONSENSUS, layer, collective=started)
            else:
                clock.enter(Phase.PLAN, layer)
        round.wait()
        if consensus.communicates:
            clock.sent(self.collectives.bytes_sent - sent)
        if round.complete and not (layout.has_extra_counts and consensus.counts_only):
            clock.enter(Phase.PLAN, layer)
        exact = False
        while True:
            verdict = round.verdict(exact=exact)
            keep_TK, extra_Te = self._apply(verdict, routing, step, claims)
            ids_TM = _merge(routing.topk_ids_TK, keep_TK, extra_Te, self._own.start)
            order = layout.sort(ids_TM)
            rows_Wn2 = self._rows(verdict, claims, order, layout, step, clock)
            # SYNC: all_to_all takes its splits as host integers; the layer's only copy. The flags
            # for ties and bad scores ride along.
            host = rows_Wn2.cpu().numpy()
            self._check_finite(host[:, -2])
            if exact or not host[:, -1].any():
                break
            exact = True
        exchanged_Wn = host[:, : -self._router.num_experts - 2]
        return Decision(
            ids_TM=ids_TM,
            weights_TM=self._weights(routing, keep_TK, extra_Te),
            keep_TK=keep_TK,
            extra_Te=extra_Te,
            order=order,
            exchanged_Wn=exchanged_Wn,
            counts_WE=layout.counts(exchanged_Wn),
            before_WE=host[:, exchanged_Wn.shape[1] : -2],
        )

    def _apply(
        self, verdict: Selection, routing: Routing, step: MoEStep, claims: Claims
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
        allowed_Te = self._claims.outside_topk(routing, step) & (free_P[pool_e] > 0)
        budget: torch.Tensor | int = num_local if self.config.expand is None else self.config.expand
        if self.config.extras == "dropped":
            budget = (~keep_TK).sum(1, keepdim=True).clamp(max=budget)
        scores_Te = routing.scores_TE[:, self._own]
        wanted_Te = candidates(scores_Te, allowed_Te, budget)
        return keep_TK, choose_extras(
            scores_Te, wanted_Te, pool_e, free_P, step.request_T, step.position_T
        )

    def _rows(
        self,
        verdict: Selection,
        claims: Claims,
        order: ExpertOrder,
        layout: ExpertLayout,
        step: MoEStep,
        clock: PhaseClock,
    ) -> torch.Tensor:
        """Every rank's numbers [W, n + E + 2]: of its rows, rows before capacity, bad, tied."""
        num_experts, size = self._router.num_experts, self.collectives.size
        tied, own = verdict.tied.long(), order.numbers
        assert own is not None
        if verdict.rows_WE2 is None:
            before_E = claims.count_codes()[: 2 * num_experts].view(2, num_experts).sum(0)
            if not self._consensus.communicates:
                clock.enter_collective(Phase.CONSENSUS, self._layer)
            return self._gather(torch.cat((own, before_E, claims.bad, tied[None])), clock)
        exchanged_Wn = verdict.rows_WE2[:, :num_experts]
        if layout.has_extra_counts and verdict.all_ids is not None:
            most = max(step.num_tokens_W)
            ids_WTM = verdict.all_ids().view(size, most, claims.padded // max(most, 1))
            exchanged_Wn = layout.numbers(ids_WTM, step.num_tokens_W)
        elif layout.has_extra_counts:
            exchanged_Wn = self._gather(own, clock)
        exchanged_Wn[self.collectives.rank] = own  # with this rank's extras
        rest_WE2 = verdict.rows_WE2[:, num_experts:]
        return torch.cat((exchanged_Wn, rest_WE2, tied.expand(size, 1)), dim=1)

    def _gather(self, own: torch.Tensor, clock: PhaseClock) -> torch.Tensor:
        """Every rank's numbers, int64 [W, n]. Collective."""
        sent = self.collectives.bytes_sent
        gathered = self.collectives.all_gather(own).wait()
        clock.sent(self.collectives.bytes_sent - sent)
        clock.enter(Phase.PLAN, self._layer)
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
