"""Layer agreement: steps 3 and 4 of an MoE layer, from its routing to the plans of its dispatch.

Holds where a layer's experts are, which policy limits them and which statistics are kept of it. The
capacity code sees experts in *home order* (those of rank 0, then of rank 1, ...), in which the
experts of a rank are contiguous.

Legend: T tokens of this rank, K top-k, E experts, W expert-parallel ranks, n rows of an exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from engine.config import CapacityConfig
from engine.config.world_rules import validate_capacity
from engine.distributed.collectives import Collectives
from engine.moe.capacity.copies_agreement import CopiesAgreement
from engine.moe.capacity.decision import Decision, DeviceDecision, Kept, OnOrder
from engine.moe.capacity.device_agreement import DeviceAgreement
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.layout_policy import LayoutPolicy
from engine.moe.dispatch.plan import DispatchPlan
from engine.moe.dispatch.rounds import Round, plan_rounds
from engine.moe.placement.instances import Instances
from engine.moe.placement.row_split import RowSplit, SplitRule
from engine.moe.router import RouterSpec, Routing
from engine.moe.stats import LayerStats
from engine.moe.step import MoEStep
from engine.profiling.telemetry import Telemetry

_Kept = TypeVar("_Kept", bound=Kept)


class LayerAgreement:
    """What the ranks of one layer agree on.

    Args:
        router: of the layer.
        layer: its index.
        instances: of its experts.
        rule: by which rows are split over copies.
        policy: lays out its calls.
        collectives: that exchange counts.
        rank: of this process in the expert-parallel group.
        ranks: world ranks of the group, in order.
        config: moe.capacity.

    Raises:
        ValueError: settings that this model or number of ranks cannot honour.
    """

    def __init__(
        self,
        router: RouterSpec,
        *,
        layer: int,
        instances: Instances,
        rule: SplitRule,
        policy: LayoutPolicy,
        collectives: Collectives,
        rank: int,
        ranks: Sequence[int],
        config: CapacityConfig,
    ) -> None:
        self._router, self._layer, self._rule = router, layer, rule
        self._policy, self._collectives = policy, collectives
        self._rank, self._ranks = rank, ranks
        self._stats = LayerStats(layer, instances, rank)
        self._use(instances)
        self.set_capacity(config)

    @property
    def stats(self) -> LayerStats:
        """What capacity did to this rank's tokens, and the loads."""
        return self._stats

    @property
    def adds_extras(self) -> bool:
        """Whether a policy gives tokens further experts."""
        return self._agreement.adds_extras

    @property
    def low_bit_copies(self) -> bool:
        """Whether copies are less precise than homes, and take rows by claims alone."""
        return self._rule.low_bit

    def applies(self, step: MoEStep | None) -> bool:
        """Return whether claims decide in a step, the same on every rank."""
        return step is not None and self._agreement.applies(step)

    def costs_exchange(self, step: MoEStep | None) -> bool:
        """Return whether the loads of a step would be exchanged for deduplication alone."""
        return self._agreement.costs_exchange(step)

    def set_instances(self, instances: Instances) -> None:
        """Use other copies, between steps and alike on every rank."""
        self._stats.instances = instances
        self._use(instances)
        self.set_capacity(self._agreement.config)

    def _use(self, instances: Instances) -> None:
        self.instances = instances
        self.local_experts = instances.local_experts(self._rank)  # of this rank's instances
        self._split = RowSplit(instances, self._rule) if instances.has_copies else None

    def set_capacity(self, config: CapacityConfig) -> None:
        """Change the capacity policy, between steps and alike on every rank.

        Raises:
            ValueError: settings that this model or number of ranks cannot honour.
        """
        if self._policy.moves_shared and config.policy == "expanded_drop":
            raise ValueError(
                "moe.shared_expert = balanced: moe.capacity.policy = expanded_drop adds rows of "
                "which other ranks do not know; use replicated"
            )
        if self._router.weights_on_input and config.policy == "expanded_drop":
            raise ValueError(
                "moe.capacity.policy = expanded_drop: this model's combine weights multiply the "
                "experts' input, so a row cannot serve a second expert of another weight; use "
                "token_drop or none"
            )
        if not self._router.scores_known and config.policy == "expanded_drop":
            raise ValueError(
                f"moe.capacity.policy = expanded_drop: the router of {self._router.external} gives "
                "the combine weights of the chosen experts alone, so an extra would have none; use "
                "token_drop, which ranks assignments by these weights, or none"
            )
        if (
            self._router.num_zero_experts
            and self._router.normalize
            and config.policy == "expanded_drop"
        ):
            raise ValueError(
                "moe.capacity.policy = expanded_drop: this model divides combine weights by the "
                "sum of a token's scores, zero experts' included, which are not kept for the "
                "weight of an extra; use token_drop or none"
            )
        validate_capacity(
            config,
            num_experts=self._router.num_experts,
            num_zero_experts=self._router.num_zero_experts,
            top_k=self._router.top_k,
            expert_ranks=len(self._ranks),
            most_local=self.instances.most_local,
            has_copies=self._split is not None,
        )
        settings = {
            "layer": self._layer,
            "layout": self._policy.choose(None),
            "collectives": self._collectives,
            "ranks": self._ranks,
        }
        if self._split is not None:
            self._agreement = CopiesAgreement(self._router, config, split=self._split, **settings)
        else:
            self._agreement = DeviceAgreement(self._router, config, **settings)
        self._policy.reset()

    def agree(
        self,
        routing: Routing,
        step: MoEStep | None,
        telemetry: Telemetry,
        overlap: Callable[[], None] | None = None,
        layout: ExpertLayout | None = None,
        micro_batch: int | None = None,
        on_order: OnOrder | None = None,
        uses_copies: bool = True,
    ) -> tuple[Decision, list[DispatchPlan]]:
        """Steps 3 and 4: return the decision, and one plan per chunk.

        Collective over EP: every rank must call.

        Args:
            routing: of this rank's tokens.
            step: which tokens are subject to capacity; None: none.
            telemetry: of the layer.
            overlap: work to do once while the ranks agree.
            layout: the chunks of this call; None: as configured.
            micro_batch: of a step of two.
            on_order: called with this rank's order before the counts of all are read.
            uses_copies: whether rows may move to copies, the same on every rank.
        """
        if layout is None:
            costs_exchange = self._agreement.costs_exchange(step)
            layout = self._policy.choose(None, costs_exchange=costs_exchange)
        clock, agreement, instances = telemetry.clock, self._agreement, self.instances
        if step is not None and agreement.applies(step):
            decision = agreement.decide(
                self._in_home_order(routing),
                step,
                clock=clock,
                overlap=overlap,
                layout=layout,
                on_order=on_order,
            )
        else:
            at_home = routing
            if instances.has_copies or not instances.has_contiguous_homes:
                homes_TK = instances.homes(routing.topk_ids_TK)
                at_home = Routing(routing.scores_TE, homes_TK, routing.topk_weights_TK)
            decision = agreement.keep_all(
                at_home,
                clock=clock,
                overlap=overlap,
                layout=layout,
                on_order=on_order,
                uses_copies=uses_copies,
            )
        plans = layout.plans(decision.order, decision.exchanged_Wn, self._rank)
        self._stats.add(telemetry, routing, decision, plans, step, micro_batch)
        return decision, plans

    def agree_on_device(
        self,
        routing: Routing,
        step: MoEStep | None,
        telemetry: Telemetry,
        overlap: Callable[[], None] | None,
        layout: ExpertLayout,
    ) -> DeviceDecision:
        """Step 3 without a host sync: the same decision as `agree`, its counts on the device.

        Collective over EP: every rank must call. See `agree` for the other arguments.

        Args:
            layout: of one chunk, without unique rows.
        """
        clock, agreement, instances = telemetry.clock, self._agreement, self.instances
        assert isinstance(agreement, DeviceAgreement), "transports refuse copies"
        if step is not None and agreement.applies(step):
            decision = agreement.decide_on_device(
                self._in_home_order(routing), step, clock=clock, overlap=overlap, layout=layout
            )
        else:
            at_home = routing
            if not instances.has_contiguous_homes:
                homes_TK = instances.homes(routing.topk_ids_TK)
                at_home = Routing(routing.scores_TE, homes_TK, routing.topk_weights_TK)
            decision = agreement.keep_all_on_device(
                at_home, clock=clock, overlap=overlap, layout=layout
            )
        self._stats.add_on_device(telemetry, routing, decision, step)
        return decision

    def most_received(self, group_tokens: int | None) -> int | None:
        """Return the rows that no rank receives more of in a call; None: not known. The same on
        every rank.

        group_tokens: of the call over all ranks; None: not known.
        """
        if group_tokens is None:
            return None
        most = min(self._router.top_k, self._policy.most_local_experts)
        return group_tokens * most

    def scaled(self, decision: _Kept, scale_E: torch.Tensor) -> _Kept:
        """Return a decision with combine weights multiplied by their experts' numbers, float32."""
        scale_TM = scale_E[self.instances.experts(decision.ids_TM)]
        return replace(decision, weights_TM=decision.weights_TM * scale_TM)

    def plan_rounds(
        self,
        decision: Decision,
        layout: ExpertLayout,
        limit: int | None,
        group_tokens: int | None,
        micro_batch: int | None,
    ) -> list[Round]:
        """Return the rounds of a call in which some rank would receive more rows than its limit.

        Args:
            decision: of the call.
            layout: of the call.
            limit: rows that a rank may receive at once; None: any.
            group_tokens: tokens of all ranks; None: not known.
            micro_batch: of a step of two; None: the whole step.
        """
        if limit is None or self._agreement.adds_extras:  # the others do not know of the extras
            return []
        limit = limit if micro_batch is None else limit // 2
        most = min(self._router.top_k, self._policy.most_local_experts)
        if group_tokens is not None and group_tokens * most <= limit:
            return []
        exchanged_Wn = decision.exchanged_Wn
        return plan_rounds(layout, decision.order, exchanged_Wn, self._rank, limit)

    def _in_home_order(self, routing: Routing) -> Routing:
        """Return a routing with experts in home order."""
        instances = self.instances
        if instances.has_contiguous_homes:
            return routing
        return Routing(
            instances.experts_in_home_order(routing.scores_TE),
            instances.to_home_order(routing.topk_ids_TK),
            routing.topk_weights_TK,
        )
