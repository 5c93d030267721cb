"""The Mixture-of-Experts layer, expert-parallel. Read this file first.

One call on every rank of the expert-parallel group, whatever tokens each has (none is fine):

    1. slice     under attention tensor parallelism the ranks of a tensor group hold the same
    tokens: each takes its part 2. route     gate -> scores, top-k experts, combine weights
    router.py 3. agree     exchange the loads: every rank learns what every rank sends to every
    expert  dispatcher.py 4. plan      who sends which row where, frozen
    plan.py 5. dispatch  all-to-all: rows travel to the ranks that host their experts
    dispatcher.py 6. experts   the local experts' feed-forward
    experts.py 7. combine   all-to-all back, then each token sums its experts' rows by weight, k =
    0..K-1 8. shared    the shared expert, if the family has one, is added; a tensor group regathers
    its tokens

The sum in step 7 runs on the token's own rank in the router's order, so a token's result does not
depend on how many ranks there are.

Legend: T tokens on this rank, D model dim, K top-k, E experts, e experts on this rank, R rows
received, N assignments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.distributed.groups import Topology, expert_range
from engine.moe.dispatcher import Dispatcher
from engine.moe.experts import ExpertWeights, choose_backend, make_backend
from engine.moe.plan import DispatchPlan, make_plan, sort_by_expert
from engine.moe.router import RouterSpec, Routing, gate_logits, route
from engine.moe.token_slice import TokenSlice
from engine.ops.permute import combine_rows
from engine.profiling.phases import Phase
from engine.profiling.telemetry import Telemetry

if TYPE_CHECKING:
    from engine.config import MoEConfig


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
        self.first_expert, self.num_local_experts = expert_range(
            num_experts, group.size, group.rank
        )
        starts = [expert_range(num_experts, group.size, rank)[0] for rank in range(group.size)]
        self._first_experts = [*starts, num_experts]
        self._rank = group.rank
        self._dispatcher = Dispatcher(group)
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

    @property
    def backend(self) -> str:
        """The experts backend that `auto` was resolved to."""
        return self._run_experts.name

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank has sent to other ranks in this layer's collectives."""
        return self._dispatcher.bytes_sent

    @property
    def num_collectives(self) -> int:
        """Collectives this layer has called."""
        return self._dispatcher.num_collectives

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the layer's output [T, D] in x's dtype. Collective over EP: every rank must call,
        T may be 0.
        """
        clock = self.telemetry.clock
        clock.enter(Phase.GATE)
        own_TD = self._slice.take(x_TD)
        routing = self.route(own_TD)
        plan = self.agree(routing)
        out_TD = self.run(own_TD, routing, plan)
        if self.shared is not None:
            clock.enter(Phase.EXPERTS)
            out_TD = out_TD + self.shared(own_TD)
        clock.enter(Phase.OTHER)
        return self._slice.regather(out_TD, x_TD.shape[0])

    def route(self, x_TD: torch.Tensor) -> Routing:
        """Step 2: this rank's tokens choose their experts."""
        logits_TE = gate_logits(x_TD, self.gate_weight_ED, self.spec.router)
        return route(logits_TE, self.spec.router, self.gate_bias_E)

    def agree(self, routing: Routing) -> DispatchPlan:
        """Steps 3 and 4: exchange loads and freeze the plan. Collective over EP: every rank must
        call.
        """
        clock = self.telemetry.clock
        clock.enter(Phase.PLAN)
        order = sort_by_expert(routing.topk_ids_TK, self.spec.router.num_experts)
        clock.enter(Phase.CONSENSUS)
        counts_WE = self._dispatcher.exchange_counts(order.load_E)
        clock.enter(Phase.PLAN)
        plan = make_plan(order, counts_WE, self._rank, self._first_experts)
        self.telemetry.loads.record(self.layer, plan.expert_loads, plan.rank_loads)
        return plan

    def run(self, x_TD: torch.Tensor, routing: Routing, plan: DispatchPlan) -> torch.Tensor:
        """Steps 5 to 7: rows travel, experts work, rows return. Collective over EP: every rank must
        call.
        """
        clock, dispatcher = self.telemetry.clock, self._dispatcher
        rows = dispatcher.pack(x_TD, plan)
        clock.enter(Phase.DISPATCH)
        rows = dispatcher.dispatch(rows, plan)
        clock.enter(Phase.EXPERTS)
        rows = self._run_experts(dispatcher.group_by_expert(rows, plan), plan.expert_counts)
        rows = dispatcher.ungroup(rows, plan)
        clock.enter(Phase.COMBINE)
        rows = dispatcher.combine(rows, plan)
        clock.enter(Phase.PLAN)
        return combine_rows(rows, plan.order.slot_TK, routing.topk_weights_TK)


def _empty(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=False)
