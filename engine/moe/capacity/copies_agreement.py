"""Copies agreement: `CapacityAgreement` of a layer whose experts have copies.

Two ways, the same on every rank:

    by counts   copies in the model's precision, no limit in this step: the ranks exchange their
                loads as without copies, and every rank computes the split from them
    by claims   low-bit copies, or a capacity policy: claims are gathered with all keys, since it
                matters which rows move (`claim_split.py`)

Where nothing moves, a call by counts is that of a layer without copies. One that moves rows costs
no collective more, but where the layout exchanges more than loads (unique rows, chunks of tokens):
these follow from which rows have moved, so they are exchanged again.

Legend: T tokens on this rank, K top-k, N claims of this rank, E experts in home order, I instances,
e instances on this rank, W expert-parallel ranks, n counts per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from engine.config import CapacityConfig
from engine.distributed.collectives import Collectives, run_overlapped
from engine.moe.capacity.agreement import CapacityAgreement
from engine.moe.capacity.claim_split import Limits, SplitClaims, split_claims
from engine.moe.capacity.consensus_global import GatheredClaims
from engine.moe.capacity.decision import Decision, OnOrder
from engine.moe.capacity.expansion import choose_extras
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.placement.row_split import RowSplit
from engine.moe.router import RouterSpec, Routing
from engine.moe.step import MoEStep
from engine.ops.claims import ExtraRule
from engine.ops.select_experts import apply_selection
from engine.ops.sort_by_expert import sort_by_expert
from engine.ops.to_device import to_device
from engine.profiling.device_clocks import NoClock
from engine.profiling.phase_clock import Phase, PhaseClock


class CopiesAgreement(CapacityAgreement):
    """Decides one MoE layer's drops, extras and the rows of copies together with the other ranks.

    Build it with the same arguments on every rank.

    Args:
        router: of the layer.
        config: moe.capacity; consensus global, tiers two.
        layer: for random order and errors.
        layout: of instances.
        collectives: of the expert-parallel group.
        split: of the layer.
        ranks: the group's ranks as errors name them, by default 0 .. W - 1.
    """

    def __init__(
        self,
        router: RouterSpec,
        config: CapacityConfig,
        *,
        layer: int,
        layout: ExpertLayout,
        collectives: Collectives,
        split: RowSplit,
        ranks: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            router,
            config,
            layer=layer,
            layout=layout,
            collectives=collectives,
            ranks=ranks,
            first_homes=split.instances.first_homes,
            has_copies=True,
        )
        self._split = split
        self._local = LocalOrder(split, collectives.rank)

    def applies(self, step: MoEStep | None) -> bool:
        """Return whether the claims decide in this step, the same on every rank."""
        if step is None or not step.num_eligible:
            return False
        return self._split.rule.low_bit or super().applies(step)

    def costs_exchange(self, step: MoEStep | None) -> bool:
        """Return whether more counts than loads cost one more collective in this step."""
        return not self.applies(step)

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
        """Keep every assignment, and split the rows by counts; see `CapacityAgreement.keep_all`.

        Low-bit copies take none: without claims it is not known which rows matter least.

        Args:
            routing: experts as the instances of their homes.
        """
        instances, split, rank = self._split.instances, self._split, self.collectives.rank
        decision = self._exchange_loads(
            routing, clock=clock, overlap=overlap, layout=layout, on_order=on_order
        )
        load_I = decision.before_WE[rank]
        loads_WE = decision.before_WE[:, instances.home_instance_E]
        decision = replace(decision, before_WE=loads_WE, counts_WE=loads_WE)
        if not uses_copies or split.rule.low_bit:
            return decision
        rows_I = split.rows(loads_WE.sum(0))
        if not rows_I[~instances.is_home_I].any():
            return decision
        slot_TK = decision.order.slot_TK
        if layout.by_tokens:
            slot_TK = sort_by_expert(routing.topk_ids_TK, instances.num_instances)[1]
            first_I = load_I.cumsum() - load_I
        else:
            first_I = layout.first_slots(load_I)
        offset_E = first_I[instances.home_instance_E] - loads_WE[:rank].sum(0)
        ids_TK = split.instances_of(routing.topk_ids_TK, slot_TK, offset_E, rows_I)
        order = layout.sort(ids_TK)
        if on_order is not None:
            on_order(order)
        if layout.has_extra_counts:
            assert order.counts_to_exchange is not None
            # SYNC: all_to_all takes its splits as host integers.
            exchanged_Wn = self._gather(order.counts_to_exchange, clock).cpu().numpy()
        else:
            exchanged_Wn = split.deal(loads_WE, rows_I)
        return replace(decision, ids_TM=ids_TK, order=order, exchanged_Wn=exchanged_Wn)

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
        """Agree on drops, extras and rows of copies by claims; see `CapacityAgreement.decide`."""
        clock, layer = clock or NoClock(), self._layer
        layout = layout or self._layout
        sent = self.collectives.bytes_sent
        clock.enter(Phase.PLAN, layer)
        claims = self._claims.make(routing, step)
        claims = replace(claims, num_primary=len(claims.keys))
        gathered = run_overlapped(
            lambda: GatheredClaims(claims, self.collectives),
            overlap,
            clock,
            layer,
            phase=Phase.CONSENSUS,
        )
        gathered.wait()
        clock.sent(self.collectives.bytes_sent - sent)
        clock.enter(Phase.PLAN, layer)
        limits = self._limits(step)
        made = split_claims(gathered, self._split, limits, step.weights_W)
        self._check_finite(made.non_finite_W)
        num_tokens, top_k = routing.topk_ids_TK.shape
        own = made.instance_WB[self.collectives.rank, : num_tokens * top_k]
        ids_TM = own.view(num_tokens, top_k)
        keep_TK, extra_Te = self._with_zero_experts(ids_TM >= 0, routing), None
        if self._expands and limits is not None:
            extra_Te = self._extras(routing, step, made, limits, keep_TK)
        weights_TM, ids_TM = self._weigh(routing, keep_TK, ids_TM, extra_Te)
        order = layout.sort(ids_TM)
        if on_order is not None:
            on_order(order)
        exchanged_Wn = self._counts(made, order.counts_to_exchange, layout, step)
        return Decision(
            ids_TM=ids_TM,
            weights_TM=weights_TM,
            order=order,
            exchanged_Wn=exchanged_Wn,
            before_WE=made.before_WE,
            counts_WE=self._split.instances.fold(layout.loads(exchanged_Wn)),
            keep_TK=keep_TK,
            extra_Te=extra_Te,
        )

    def _limits(self, step: MoEStep) -> Limits | None:
        """Return the limits of this step; None: nothing may be dropped."""
        if not super().applies(step):
            return None
        if self.config.scope == "expert":
            return Limits(capacity=self._claims.capacity(step.num_eligible))
        return Limits(rank_W=np.array(self._claims.rank_limits(step), dtype=np.int64))

    def _extras(
        self,
        routing: Routing,
        step: MoEStep,
        made: SplitClaims,
        limits: Limits,
        keep_TK: torch.Tensor,
    ) -> torch.Tensor:
        """Return the extras of this rank's tokens, in slots that are free after the split: bool
        [T, e].
        """
        local, device = self._local, keep_TK.device
        if not keep_TK.shape[0]:
            return keep_TK.new_zeros((0, local.size))
        rank = self.collectives.rank
        assert limits.rank_W is not None, "with copies, extras need the scope rank"
        free = int(limits.rank_W[rank] - made.load_W[rank])
        free_P = to_device(torch.tensor([free]), device)
        pool_e = free_P.new_zeros(local.size)
        budget = local.size if self.config.expand is None else self.config.expand
        some_none = self._router.num_zero_experts > 0
        rule = ExtraRule(0, min(budget, local.size), some_none=some_none)
        lost = keep_TK if self.config.extras == "dropped" else None
        return choose_extras(local.routing(routing), step, pool_e, free_P, rule, lost)

    def _weigh(
        self,
        routing: Routing,
        keep_TK: torch.Tensor,
        ids_TK: torch.Tensor,
        extra_Te: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the combine weights and instances of all columns, [T, M]."""
        local = self._local
        routing = routing if extra_Te is None else local.routing(routing)
        _, weights_TM = apply_selection(
            keep_TK,
            routing.scores_TE,
            routing.topk_ids_TK,
            routing.topk_weights_TK,
            self._router.rule,
            0,
            self.config.renormalize,
            extra_Te,
        )
        if extra_Te is None:
            return weights_TM, ids_TK
        numbers_e = torch.arange(local.size, device=ids_TK.device) + local.first
        return weights_TM, torch.cat((ids_TK, numbers_e.where(extra_Te, -1)), dim=1)

    def _counts(
        self,
        made: SplitClaims,
        own: torch.Tensor | None,
        layout: ExpertLayout,
        step: MoEStep,
    ) -> np.ndarray:
        """Return every rank's counts to exchange on the host: int64 [W, n]."""
        assert own is not None
        exchanged_Wn = made.counts_WI
        if layout.has_extra_counts:
            most = max(step.num_tokens_W)
            padded = most * self._router.top_k
            ids_WTM = made.instance_WB[:, :padded].reshape(len(made.instance_WB), most, -1)
            exchanged_Wn = layout.counts_to_exchange(ids_WTM, step.num_tokens_W)
        exchanged_Wn[self.collectives.rank] = own  # with this rank's extras
        # SYNC: all_to_all takes its splits as host integers.
        return exchanged_Wn.cpu().numpy()


class LocalOrder:
    """Experts numbered as one rank sees them: those that it holds first, in the order of its
    instances, then the others. The ops for extras take a range of local experts.
    """

    def __init__(self, split: RowSplit, rank: int) -> None:
        instances = split.instances
        self.first, end = instances.first_instances[rank : rank + 2]
        self.size = end - self.first
        held = instances.home_order_E[instances.expert_I[self.first : end]].tolist()
        others = sorted(set(range(instances.num_experts)) - set(held))
        self._order_E = np.array([*held, *others], dtype=np.int64)
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def routing(self, routing: Routing) -> Routing:
        """Return a routing in home order with experts in this order."""
        order_E, place_E = self._table(routing.topk_ids_TK.device)
        return replace(
            routing,
            scores_TE=routing.scores_TE[:, order_E],
            topk_ids_TK=place_E[routing.topk_ids_TK],
        )

    def _table(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._tables:
            order_E = torch.from_numpy(self._order_E)
            self._tables[device] = (
                to_device(order_E, device),
                to_device(F.pad(order_E.argsort(), (0, 1), value=-1), device),  # -1 stays
            )
        return self._tables[device]
