"""Agreement: from one rank's routing to what is computed, decided alike on all ranks.

Step 3 of `layer.py`. Without a capacity policy, or where it cannot bind, the ranks exchange their
loads and every assignment is kept. Otherwise, in order:

    claims     every assignment subject to capacity gets its sort keys      claim_maker.py
    consensus  overloaded pools are cut                                     consensus.py
    extras     Expanded Drop: this rank's free slots for its own tokens     expansion.py
    order      what is left, sorted by expert                               plan.py
    rows       every rank's row counts, copied to the host: the one sync of the layer; where the
               layout needs more than loads, from the claims of all ranks (`global` by gather), by
               one more exchange (`quota` with scope `expert`), else in the exchange of the rows

Equal claims at a cut cost a second selection; all ranks see the same flag and repeat it together.
Where requests share a prefix they are no exception, so for some calls after one, all keys are used
at once.

Legend: T tokens on this rank, K top-k, M columns of the result (K, or K + e), N columns subject to
capacity, E experts, e experts on this rank, P pools, W expert-parallel ranks, n counts per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from engine.config import CapacityConfig
from engine.distributed.collectives import Collectives, Pending, run_overlapped
from engine.moe.capacity.claim_maker import ClaimMaker
from engine.moe.capacity.consensus import Claims, Consensus, PendingSelection, Selection
from engine.moe.capacity.consensus_registry import make_consensus
from engine.moe.capacity.decision import Decision, OnOrder
from engine.moe.capacity.expansion import choose_extras
from engine.moe.capacity.limits import cannot_bind
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.plan import ExpertOrder
from engine.moe.router import RouterSpec, Routing
from engine.moe.step import MoEStep
from engine.ops.claims import ExtraRule
from engine.ops.select_experts import apply_selection
from engine.profiling.device_clocks import NoClock
from engine.profiling.phase_clock import Phase, PhaseClock

# Calls after one with equal claims at a cut in which the claims are compared by all keys at once: a
# second selection is the exception again, and a job whose prefixes no longer repeat sends less.
_CALLS_WITH_ALL_KEYS = 64


class CapacityAgreement:
    """Decides one MoE layer's drops and extras together with the other ranks.

    Build it with the same arguments on every rank.

    Args:
        router: of the layer.
        config: moe.capacity.
        layer: for random order and errors.
        layout: which rank hosts which experts; the send order where a call names none.
        collectives: of the expert-parallel group.
        ranks: the group's ranks as errors name them, by default 0 .. W - 1.
        first_homes: W + 1 boundaries of the ranks' experts in home order, in which all experts here
            are; None: those of `layout`.
        has_copies: whether ranks hold copies of other ranks' experts (`copies_agreement.py`).
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
        first_homes: list[int] | None = None,
        has_copies: bool = False,
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
            first_experts=first_homes or layout.first_experts,
            rank=collectives.rank,
            has_copies=has_copies,
        )
        self._own = self._claims.own
        self._binds = config.policy != "none" and not cannot_bind(
            config.exact_factor, router.top_k, router.num_logits
        )
        self._expands = config.policy == "expanded_drop" and config.expand != 0
        self._calls_with_all_keys = 0  # that are left, the same on every rank
        self._consensus: Consensus = make_consensus(
            config.consensus, config.selection, self._claims.pools, collectives
        )

    @property
    def adds_extras(self) -> bool:
        """Whether ranks may add rows for their own experts, of which the others do not know."""
        return self._expands

    def applies(self, step: MoEStep | None) -> bool:
        """Return whether anything may be dropped or added in this step, the same on every rank."""
        if step is None or not self._binds or not step.num_eligible:
            return False
        if self._expands or self.config.consensus == "local":
            return True
        return self._claims.may_bind(step)

    def costs_exchange(self, step: MoEStep | None) -> bool:
        """Return whether a layout with more counts than loads by expert costs one more collective
        in this step, the same on every rank.
        """
        return self._consensus.counts_only and self.applies(step)

    def decide(
        self,
        routing: Routing,
        step: MoEStep,
        *,
        clock: PhaseClock | None = None,
        overlap: Callable[[], None] | None = None,
        layout: ExpertLayout | None = None,
        on_order: OnOrder | None = None,
    ) -> Decision:
        """Agree on this layer's drops and extras. Collective over EP: every rank must call.

        Args:
            routing: of this rank's tokens.
            step: which tokens are subject to capacity.
            clock: enters PLAN and, exactly once, CONSENSUS.
            overlap: work to do while the first collective is in flight.
            layout: the send order of this call, the same on every rank.
            on_order: called with this rank's order before the counts are read, and again where
                equal claims change it.

        Raises:
            ValueError: a router score is NaN or infinite on some rank; on every rank.
        """
        clock, layout = clock or NoClock(), layout or self._layout
        all_keys = self._calls_with_all_keys > 0
        self._calls_with_all_keys -= all_keys
        claims, pending = self._begin(routing, step, clock, overlap, layout, all_keys)
        exact = False
        while True:
            selection = pending.select(exact=exact)
            keep_TK, extra_Te, ids_TM, weights_TM = self._chosen(selection, routing, step, claims)
            order = layout.sort(ids_TM)
            rows_Wn2 = self._rows(selection, claims, order, layout, step, clock)
            if on_order is not None:
                on_order(order)
            # SYNC: all_to_all takes its splits as host integers; the layer's only copy. The flags
            # for ties and non-finite scores are part of it.
            host = rows_Wn2.cpu().numpy()
            self._check_finite(host[:, -2])
            if exact or not host[:, -1].any():
                break
            exact, self._calls_with_all_keys = True, _CALLS_WITH_ALL_KEYS
        exchanged_Wn = host[:, : -self._router.num_experts - 2]
        return Decision(
            ids_TM=ids_TM,
            weights_TM=weights_TM,
            order=order,
            exchanged_Wn=exchanged_Wn,
            before_WE=host[:, exchanged_Wn.shape[1] : -2],
            counts_WE=layout.loads(exchanged_Wn),
            keep_TK=keep_TK,
            extra_Te=extra_Te,
        )

    def keep_all(
        self,
        routing: Routing,
        *,
        clock: PhaseClock,
        overlap: Callable[[], None] | None,
        layout: ExpertLayout,
        on_order: OnOrder | None = None,
        uses_copies: bool = True,
    ) -> Decision:
        """Keep every assignment and exchange the loads; for steps in which `applies` is false.

        Collective over EP: every rank must call. See `decide` for the other arguments.

        Args:
            uses_copies: whether rows may move to copies, where there are some.
        """
        del uses_copies
        return self._exchange_loads(
            routing, clock=clock, overlap=overlap, layout=layout, on_order=on_order
        )

    def _exchange_loads(
        self,
        routing: Routing,
        *,
        clock: PhaseClock,
        overlap: Callable[[], None] | None,
        layout: ExpertLayout,
        on_order: OnOrder | None,
    ) -> Decision:
        """Keep every assignment, at its expert's home. Collective over EP."""
        sent = self.collectives.bytes_sent
        order, pending = self._start_loads(routing, clock, overlap, layout, on_order)
        # SYNC: all_to_all takes its splits as host integers; one copy per layer.
        exchanged_Wn = pending.wait().cpu().numpy()
        clock.sent(self.collectives.bytes_sent - sent)
        clock.enter(Phase.PLAN, self._layer)
        loads_WE = layout.loads(exchanged_Wn)
        return Decision(
            ids_TM=routing.topk_ids_TK,
            weights_TM=routing.topk_weights_TK,
            order=order,
            exchanged_Wn=exchanged_Wn,
            before_WE=loads_WE,
            counts_WE=loads_WE,
        )

    def _start_loads(
        self,
        routing: Routing,
        clock: PhaseClock,
        overlap: Callable[[], None] | None,
        layout: ExpertLayout,
        on_order: OnOrder | None,
    ) -> tuple[ExpertOrder, Pending]:
        """Sort all assignments and start to gather every rank's counts. Collective over EP."""
        clock.enter(Phase.PLAN, self._layer)
        order = layout.sort(routing.topk_ids_TK)
        assert order.counts_to_exchange is not None
        counts, collectives = order.counts_to_exchange, self.collectives

        def work() -> None:
            if overlap is not None:
                overlap()
            if on_order is not None:
                on_order(order)

        pending = run_overlapped(
            lambda: collectives.all_gather(counts),
            None if overlap is on_order is None else work,
            clock,
            self._layer,
            phase=Phase.CONSENSUS,
        )
        return order, pending

    def _begin(
        self,
        routing: Routing,
        step: MoEStep,
        clock: PhaseClock,
        overlap: Callable[[], None] | None,
        layout: ExpertLayout,
        all_keys: bool,
    ) -> tuple[Claims, PendingSelection]:
        """Make this rank's claims and let the ranks exchange theirs. Collective over EP.

        all_keys: compare claims by all keys at once.
        """
        consensus, layer, sent = self._consensus, self._layer, self.collectives.bytes_sent
        clock.enter(Phase.PLAN, layer)
        claims = self._claims.make(routing, step)
        if all_keys:
            claims = replace(claims, num_primary=len(claims.keys))
        pending = run_overlapped(
            lambda: consensus.begin(claims),
            overlap,
            clock,
            layer,
            phase=Phase.CONSENSUS if consensus.communicates else None,
        )
        pending.wait()
        if consensus.communicates:
            clock.sent(self.collectives.bytes_sent - sent)
        if pending.complete and not (layout.has_extra_counts and consensus.counts_only):
            clock.enter(Phase.PLAN, layer)
        return claims, pending

    def _chosen(
        self, selection: Selection, routing: Routing, step: MoEStep, claims: Claims
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return keep_TK and extra_Te of a selection, and the ids and weights [T, M] they leave."""
        keep_TK, extra_Te = self._apply(selection, routing, step, claims)
        ids_TM, weights_TM = apply_selection(
            keep_TK,
            routing.scores_TE,
            routing.topk_ids_TK,
            routing.topk_weights_TK,
            self._router.rule,
            self._own.start,
            self.config.renormalize,
            extra_Te,
        )
        return keep_TK, extra_Te, ids_TM, weights_TM

    def _apply(
        self, selection: Selection, routing: Routing, step: MoEStep, claims: Claims
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return keep_TK and extra_Te of a selection."""
        num_tokens, top_k = routing.topk_ids_TK.shape
        keep_TN = selection.keep_N.view(num_tokens, claims.code_N.numel() // max(num_tokens, 1))
        if not num_tokens:
            keep_TN = selection.keep_N.view(0, top_k)
        keep_TK = keep_TN[:, :top_k]
        # Tokens that are not subject to capacity keep all of theirs.
        if step.eligible_T is not None:
            keep_TK = keep_TK | ~step.eligible_T[:, None]
        keep_TK = self._with_zero_experts(keep_TK, routing)
        if not self._expands:
            return keep_TK, None
        num_local = self._own.stop - self._own.start
        if not num_tokens:
            return keep_TK, keep_TK.new_zeros((0, num_local))
        if self.config.tiers == "one":
            return keep_TK, keep_TN[:, top_k : top_k + num_local]
        # The slots that are left, for this rank's own tokens and experts.
        free_P = claims.limit_P - selection.pool_kept_P
        pool_e = claims.pool_of_code[self._own]
        budget = num_local if self.config.expand is None else self.config.expand
        rule = ExtraRule(self._own.start, budget, some_none=self._router.num_zero_experts > 0)
        lost = keep_TK if self.config.extras == "dropped" else None
        return keep_TK, choose_extras(routing, step, pool_e, free_P, rule, lost)

    def _with_zero_experts(self, keep_TK: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Return keep_TK with assignments to zero experts, which are not claims, as kept."""
        if not self._router.num_zero_experts:
            return keep_TK
        return keep_TK | (routing.topk_ids_TK < 0)

    def _rows(
        self,
        selection: Selection,
        claims: Claims,
        order: ExpertOrder,
        layout: ExpertLayout,
        step: MoEStep,
        clock: PhaseClock,
    ) -> torch.Tensor:
        """Return every rank's counts, int64 [W, n + E + 2]: of its rows, its assignments before
        capacity, and the flags for non-finite scores and ties.
        """
        num_experts, size = self._router.num_experts, self.collectives.size
        tied, own = selection.tied.long(), order.counts_to_exchange
        assert own is not None
        if selection.rows_WE2 is None:
            before_E = claims.count_codes()[: 2 * num_experts].view(2, num_experts).sum(0)
            if not self._consensus.communicates:
                clock.enter_collective(Phase.CONSENSUS, self._layer)
            return self._gather(torch.cat((own, before_E, claims.non_finite, tied[None])), clock)
        exchanged_Wn = selection.rows_WE2[:, :num_experts]
        if layout.has_extra_counts and selection.all_ids is not None:
            most = max(step.num_tokens_W)
            ids_WTM = selection.all_ids().view(size, most, claims.padded // max(most, 1))
            exchanged_Wn = layout.counts_to_exchange(ids_WTM, step.num_tokens_W)
        elif layout.has_extra_counts:
            exchanged_Wn = self._gather(own, clock)
        exchanged_Wn[self.collectives.rank] = own  # with this rank's extras
        rest_WE2 = selection.rows_WE2[:, num_experts:]
        return torch.cat((exchanged_Wn, rest_WE2, tied.expand(size, 1)), dim=1)

    def _gather(self, own: torch.Tensor, clock: PhaseClock) -> torch.Tensor:
        """Return every rank's counts, int64 [W, n]. Collective."""
        sent = self.collectives.bytes_sent
        gathered = self.collectives.all_gather(own).wait()
        clock.sent(self.collectives.bytes_sent - sent)
        clock.enter(Phase.PLAN, self._layer)
        return gathered

    def _check_finite(self, flag_W: np.ndarray) -> None:
        names = [str(rank) for rank, flag in zip(self._ranks, flag_W, strict=True) if flag]
        if names:
            raise ValueError(
                f"layer {self._layer}: router scores are NaN or infinite on rank "
                f"{', '.join(names)}, so the best assignments are undefined; check the checkpoint "
                "and model.dtype (float16 overflows where bfloat16 does not), or set "
                "moe.capacity.policy=none, under which only the request concerned fails"
            )
