"""The Mixture-of-Experts layer, expert-parallel. Read this file first.

One call on every rank of the expert-parallel group, whatever tokens each has (none is fine):

    1. slice     tensor ranks hold the same tokens: each takes its part     token_slice.py
    2. route     gate -> scores, top-k experts, combine weights             router.py
    3. agree     overloaded experts drop, idle ones are filled, and every   agreement.py
                 rank learns what every rank sends to every expert
    4. plan      who sends which row where, frozen; a plan a chunk          plan.py, overlap.py
    5. dispatch  all-to-all: rows travel to the ranks of their experts      pipeline.py,
                                                                            dispatcher.py
    6. experts   the local experts' feed-forward                            experts.py
    7. combine   all-to-all back, then each token sums its experts' rows    pipeline.py
                 by weight, k = 0 .. K - 1, then its extras
    8. shared    the shared expert, if there is one, is added (it ran
                 during step 3); a tensor group regathers its tokens

Without a capacity policy, or in a step in which it cannot bind, step 3 only exchanges the loads.

The sum in step 7 runs on the token's own rank in the router's order, so a token's result does not
depend on how many ranks there are. Nor does what is dropped, under `global` consensus.

Legend: T tokens on this rank, D model dim, K top-k, M columns of the decision (K, with extras one
more for each local expert), E experts, e experts on this rank, R rows received, A rows sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from engine.config import CapacityConfig, MoEConfig
from engine.config_world import validate_capacity
from engine.distributed.collectives import GroupCollectives
from engine.distributed.groups import Topology, expert_range
from engine.moe.accounting import DropAccount
from engine.moe.agreement import CapacityAgreement, Decision
from engine.moe.dispatcher import Dispatcher
from engine.moe.experts import ExpertWeights, choose_backend, make_backend
from engine.moe.overlap import ExpertLayout
from engine.moe.pipeline import Pipeline
from engine.moe.plan import DispatchPlan
from engine.moe.router import RouterSpec, Routing, gate_logits, route
from engine.moe.step import MoEStep
from engine.moe.token_slice import TokenSlice
from engine.moe.workspace import Workspace
from engine.ops.permute import combine_rows
from engine.profiling.decisions import LayerDecision
from engine.profiling.phases import Phase
from engine.profiling.telemetry import Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """Shapes of a family's MoE layer. hidden: D. ffn: F, the experts' hidden dim."""

    router: RouterSpec
    hidden: int
    ffn: int


class MoELayer(nn.Module):
    """Routed experts spread over `topology.expert`, plus an optional shared expert that every rank
    holds.

    gate_weight_ED: model dtype. gate_bias_E: float32 correction bias or None. experts: this rank's
    stacked weights, experts `first_expert` .. `first_expert + num_local_experts` - 1 of the model.
    account: what capacity did to this rank's tokens. workspace: row buffers, shared between the
    layers of a model.
    """

    def __init__(
        self,
        spec: MoESpec,
        *,
        layer: int,
        topology: Topology,
        config: MoEConfig,
        device: torch.device,
        dtype: torch.dtype,
        shared: nn.Module | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        """Allocate the weights, uninitialised; `engine/weights.py` fills them.

        Raises:
            ValueError: more expert-parallel ranks than experts, or a backend that cannot run here.
        """
        super().__init__()
        num_experts, group = spec.router.num_experts, topology.expert
        if group.size > num_experts:
            raise ValueError(
                f"parallel.expert: {group.size} exceeds the model's {num_experts} experts; start "
                f"at most {num_experts} ranks or set parallel.expert to a divisor of the ranks"
            )
        self.spec = spec
        self.layer = layer
        self.telemetry = Telemetry()
        self.account = DropAccount()
        self.workspace = workspace or Workspace()
        self.first_expert, self.num_local_experts = expert_range(
            num_experts, group.size, group.rank
        )
        starts = [expert_range(num_experts, group.size, rank)[0] for rank in range(group.size)]
        self._first_experts = [*starts, num_experts]
        self._group = group
        self._collectives = GroupCollectives(group)
        self._dispatcher = Dispatcher(group, self._collectives, self.workspace)
        chunks = config.overlap.chunks
        self._layout = ExpertLayout(self._first_experts, 1 if chunks == "auto" else chunks)
        self._serial_layout = ExpertLayout(self._first_experts, 1)
        self._slice = TokenSlice(topology.tensor)
        self.gate_weight_ED = _empty(num_experts, spec.hidden, device=device, dtype=dtype)
        self.gate_bias_E = (
            _empty(num_experts, device=device, dtype=torch.float32)
            if spec.router.correction_bias
            else None
        )
        self.experts = ExpertWeights(self.num_local_experts, spec.hidden, spec.ffn, device, dtype)
        self.shared = shared
        backend = choose_backend(config.experts.backend, device, dtype)
        self._run_experts = make_backend(backend, self.experts)
        self._pipeline = Pipeline(self._dispatcher, self._run_experts, layer)
        self.set_capacity(config.capacity)

    @property
    def backend(self) -> str:
        """The experts backend that `auto` was resolved to."""
        return self._run_experts.name

    @property
    def num_chunks(self) -> int:
        """Parts in which rows travel: moe.overlap.chunks, at most the most experts of a rank."""
        return self._layout.num_chunks

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank has sent to other ranks in this layer's collectives."""
        return self._collectives.bytes_sent

    @property
    def num_collectives(self) -> int:
        """Collectives this layer has called."""
        return self._collectives.num_collectives

    def set_capacity(self, config: CapacityConfig) -> None:
        """Change the capacity policy, between steps and alike on every rank.

        Raises:
            ValueError: settings that this model or number of ranks cannot honour.
        """
        router = self.spec.router
        validate_capacity(
            config,
            num_experts=router.num_experts,
            top_k=router.top_k,
            expert_ranks=self._group.size,
        )
        self._agreement = CapacityAgreement(
            router,
            config,
            layer=self.layer,
            layout=self._layout,
            collectives=self._collectives,
            ranks=self._group.ranks,
        )

    def forward(
        self, x_TD: torch.Tensor, step: MoEStep | None = None, group_tokens: int | None = None
    ) -> torch.Tensor:
        """Return the layer's output [T, D] in x's dtype. Collective over EP: every rank must call,
        T may be 0.

        step: who the tokens are, of this rank's slice; needed under a capacity policy, where None
        means that no token competes. group_tokens: tokens of all ranks of the group in this step,
        the same on every rank: few are not cut into chunks. None: cut as configured.
        """
        clock = self.telemetry.clock
        own_TD = self._slice.take(x_TD)
        clock.enter(Phase.GATE, self.layer, own_TD.shape[0])
        routing = self.route(own_TD)
        shared: list[torch.Tensor] = []
        meanwhile = None
        if (module := self.shared) is not None:
            meanwhile = lambda: shared.append(module(own_TD))  # noqa: E731
        layout = self._layout
        if group_tokens is not None and not layout.pays(group_tokens, self.spec.router.top_k):
            layout = self._serial_layout
        plans, weights_TM = self.agree(routing, step, meanwhile, layout)
        out_TD = self.run(own_TD, plans, weights_TM)
        if module is not None:
            clock.enter(Phase.EXPERTS, self.layer)
            out_TD = out_TD + (shared[0] if shared else module(own_TD))
        clock.enter(Phase.OTHER, self.layer)
        return self._slice.regather(out_TD, x_TD.shape[0])

    def route(self, x_TD: torch.Tensor) -> Routing:
        """Step 2: this rank's tokens choose their experts."""
        logits_TE = gate_logits(x_TD, self.gate_weight_ED, self.spec.router)
        return route(logits_TE, self.spec.router, self.gate_bias_E)

    def agree(
        self,
        routing: Routing,
        step: MoEStep | None,
        meanwhile: Callable[[], None] | None = None,
        layout: ExpertLayout | None = None,
    ) -> tuple[list[DispatchPlan], torch.Tensor]:
        """Steps 3 and 4: a plan a chunk, and the combine weights [T, M]. Collective over EP: every
        rank must call.

        meanwhile: work to do while the ranks agree; left undone where there is nothing to agree on.
        layout: in which chunks rows travel; as configured by default.
        """
        layout = layout or self._layout
        if step is None or not self._agreement.applies(step):
            if step is not None:
                self.account.add(routing, None, step)
            return self._exchange(routing, layout), routing.topk_weights_TK
        decision = self._agreement.decide(
            routing, step, clock=self.telemetry.clock, meanwhile=meanwhile, layout=layout
        )
        self.account.add(routing, decision, step)
        plans = layout.plans(decision.order, decision.counts_WE, self._group.rank)
        self._record(decision.before_WE, plans)
        if (entries := self.telemetry.decisions.entries) is not None:
            entries.append(self._entry(routing, decision, step))
        return plans, decision.weights_TM

    def _exchange(self, routing: Routing, layout: ExpertLayout) -> list[DispatchPlan]:
        """Dropless: exchange loads and freeze the plans. Collective."""
        clock = self.telemetry.clock
        clock.enter(Phase.PLAN, self.layer)
        order = layout.sort(routing.topk_ids_TK)
        clock.meet(Phase.CONSENSUS, self.layer)
        sent = self._collectives.bytes_sent
        counts_WE = self._dispatcher.exchange_counts(order.load_E)
        clock.sent(self._collectives.bytes_sent - sent)
        clock.enter(Phase.PLAN, self.layer)
        plans = layout.plans(order, counts_WE, self._group.rank)
        self._record(counts_WE, plans)
        return plans

    def _entry(self, routing: Routing, decision: Decision, step: MoEStep) -> LayerDecision:
        # SYNC: only while somebody records decisions.
        extra, competes_T = decision.extra_Te, step.competes_T
        if competes_T is None:
            competes_T = torch.ones_like(step.request_T, dtype=torch.bool)
        return LayerDecision(
            step=self.telemetry.decisions.step,
            layer=self.layer,
            request_T=step.request_T.cpu().numpy(),
            position_T=step.position_T.cpu().numpy(),
            competes_T=competes_T.cpu().numpy(),
            topk_ids_TK=routing.topk_ids_TK.cpu().numpy(),
            keep_TK=decision.keep_TK.cpu().numpy(),
            extra_Te=None if extra is None else extra.cpu().numpy(),
            first_expert=self.first_expert,
            before_WE=decision.before_WE,
            after_WE=decision.counts_WE,
        )

    def _record(self, before_WE: np.ndarray, plans: list[DispatchPlan]) -> None:
        """Note the loads: before capacity of all ranks, and what this rank's experts get."""
        before_E = before_WE.sum(0)
        upto_E = np.concatenate(([0], before_E.cumsum()))[self._first_experts]
        self.telemetry.loads.record(
            self.layer,
            before_E=before_E,
            rank_before=np.diff(upto_E).tolist(),
            own_after=np.sum([plan.expert_counts for plan in plans], axis=0).tolist(),
            first_expert=self.first_expert,
        )

    def run(
        self, x_TD: torch.Tensor, plans: list[DispatchPlan], weights_TM: torch.Tensor
    ) -> torch.Tensor:
        """Steps 5 to 7: rows travel, experts work, rows return. Collective over EP: every rank must
        call.
        """
        clock = self.telemetry.clock
        rows_AD = self._pipeline.run(x_TD, plans, clock)
        clock.enter(Phase.PLAN, self.layer)
        return combine_rows(rows_AD, plans[0].order.slot_TK, weights_TM)


def _empty(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=False)
