"""The Mixture-of-Experts layer, expert-parallel. Read this file first.

One call on every rank of the expert-parallel group, whatever tokens each has (none is fine):

    1. slice     tensor ranks hold the same tokens: each takes its part     token_slice.py
    2. route     gate -> scores, top-k experts, combine weights             router.py
    3. agree     overloaded experts drop, idle ones are filled, and every   agreement.py
                 rank learns what every rank sends to every expert
    4. plan      who sends which row where, frozen; a plan a chunk          plan.py, overlap.py
    5. dispatch  all-to-all: rows travel to the ranks of their experts,     pipeline.py,
                 one for all experts of a rank where that moves less        dedup.py, freight.py
    6. experts   the local experts' feed-forward                            experts.py
    7. combine   all-to-all back, then each token sums its experts' rows    pipeline.py
                 by weight, k = 0 .. K - 1, then its extras
    8. shared    the shared expert, if there is one, is added (it ran
                 during step 3); a tensor group regathers its tokens

Without a capacity policy, or in a step in which it cannot bind, step 3 only exchanges the loads.

The sum in step 7 runs on the token's own rank in the router's order, so a token's result does not
depend on how many ranks there are. Nor does what is dropped, under `global` consensus. With
`moe.dispatch.partial_sums` the ranks of the experts sum first, in the order of their experts: the
sum's grouping then depends on which experts share a rank, and results on the ranks by rounding.

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
from engine.config.world_rules import validate_capacity
from engine.distributed.collectives import GroupCollectives, run_overlapped
from engine.distributed.groups import Topology, expert_range
from engine.layers.mlp import DenseMLP
from engine.moe.capacity.agreement import CapacityAgreement
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.chunk_tuner import ChunkTuner, Trial
from engine.moe.dispatch.exchange import Exchange
from engine.moe.dispatch.layout_policy import LayoutPolicy
from engine.moe.dispatch.pipeline import Pipeline
from engine.moe.dispatch.plan import DispatchPlan, ExpertOrder
from engine.moe.dispatch.row_format import RowFormats
from engine.moe.dispatch.two_batch import Stages, finish
from engine.moe.experts import ExpertWeights, choose_backend, make_backend
from engine.moe.router import RouterSpec, Routing, gate_logits, route
from engine.moe.stats import DropStats, Recorder
from engine.moe.step import MoEStep
from engine.moe.token_shard import TokenShard
from engine.ops.permute import combine_rows
from engine.profiling.phase_clock import Phase
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
    layers of a model, as is the tuner, which moe.overlap.chunks: auto asks. layouts: how rows may
    travel.
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
        workspace: RowBuffers | None = None,
        tuner: ChunkTuner | None = None,
    ) -> None:
        """Allocate the weights, uninitialised; `engine/weights/loader.py` fills them.

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
        self.account = DropStats()
        self.workspace = workspace or RowBuffers()
        self.first_expert, self.num_local_experts = expert_range(
            num_experts, group.size, group.rank
        )
        starts = [expert_range(num_experts, group.size, rank)[0] for rank in range(group.size)]
        self._first_experts = [*starts, num_experts]
        self._group = group
        self._collectives = GroupCollectives(group)
        self._dispatcher = Exchange(group, self._collectives, self.workspace)
        rows = RowFormats.of(spec.hidden, dtype, config.dispatch)
        self.layouts = LayoutPolicy(self._first_experts, spec.router.top_k, rows, config)
        self.layouts.tune(layer, tuner or ChunkTuner(device), GroupCollectives(topology.control))
        self._slice = TokenShard(topology.tensor)
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
        beside = Exchange(group, self._collectives, self.workspace.second)
        self._second = Pipeline(beside, self._run_experts, layer)  # of a second half batch
        self._recorder = Recorder(layer, self._first_experts, group.rank)
        self.set_capacity(config.capacity)

    def finalize_weights(self) -> None:
        """The weights are final: the backend may bring them into a layout of its own, in place."""
        self._run_experts.finalize_weights()
        if isinstance(self.shared, DenseMLP):
            self.shared.finalize_weights()

    @property
    def backend(self) -> str:
        """The experts backend that `auto` was resolved to."""
        return self._run_experts.name

    @property
    def num_chunks(self) -> int:
        """Most parts in which rows of a call travel."""
        return self.layouts.num_chunks

    @property
    def max_collectives(self) -> int:
        """Collectives of a step at most that the phase clock is told of."""
        halves = 2 if self.layouts.two_batch else 1
        return self.layouts.max_collectives + halves * self._slice.num_collectives

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank has sent to other ranks in this layer's collectives."""
        return self._collectives.bytes_sent

    @property
    def num_collectives(self) -> int:
        """Collectives this layer has called."""
        return self._collectives.num_collectives

    def reserve(self, send_rows: int, received_rows: int) -> None:
        """Make the row buffers for good, for at most so many assignments sent and received in a
        call. Layers that share a workspace need it once.
        """
        sizes = self.layouts.buffer_sizes(send_rows, received_rows)
        self.workspace.reserve(sizes, self.gate_weight_ED.device)

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
            layout=self.layouts.choose(None),
            collectives=self._collectives,
            ranks=self._group.ranks,
        )
        self.layouts.reset()

    def forward(
        self, x_TD: torch.Tensor, step: MoEStep | None = None, group_tokens: int | None = None
    ) -> torch.Tensor:
        """Return the layer's output [T, D] in x's dtype. Collective over EP: every rank must call,
        T may be 0.

        step: who the tokens are, of this rank's slice; needed under a capacity policy, where None
        means that no token competes. group_tokens: tokens of all ranks of the group in this step,
        the same on every rank: few are not cut into chunks, nor looked through for rows that need
        to go only once. None: as configured.
        """
        return finish(self.stages(x_TD, step, group_tokens))

    def stages(
        self,
        x_TD: torch.Tensor,
        step: MoEStep | None = None,
        group_tokens: int | None = None,
        half: int | None = None,
        tunes: bool = True,
    ) -> Stages[torch.Tensor]:
        """`forward` of one half batch, 0 or 1, which stops where its rows are under way; None is a
        whole step and has no stops. tunes: see `LayoutPolicy.turn`.
        """
        clock, layouts = self.telemetry.clock, self.layouts
        own_TD = self._slice.take(x_TD)
        clock.enter(Phase.GATE, self.layer, own_TD.shape[0])
        routing = self.route(own_TD)
        shared: list[torch.Tensor] = []
        meanwhile = None
        if (module := self.shared) is not None:
            meanwhile = lambda: shared.append(module(own_TD))  # noqa: E731
        costs_exchange = self._agreement.costs_exchange(step)
        turn = layouts.begin_trial(group_tokens, tunes) if half is None else Trial(1)
        layout = layouts.choose(group_tokens, turn.chunks, costs_exchange=costs_exchange)
        plans, weights_TM = self.agree(routing, step, meanwhile, layout, half)
        pipeline = self._second if half == 1 else self._pipeline
        with turn:
            rows_AD = yield from pipeline.stages(
                own_TD, weights_TM, plans, clock, stops=half is not None
            )
            clock.enter(Phase.PLAN, self.layer)
            out_TD = combine_rows(rows_AD, *plans[0].terms(weights_TM))
        if module is not None:
            out_TD = out_TD + shared[0]
        out_TD = self._slice.gather(out_TD, x_TD.shape[0], clock, self.layer)
        clock.enter(Phase.OTHER, self.layer)
        return out_TD

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
        half: int | None = None,
    ) -> tuple[list[DispatchPlan], torch.Tensor]:
        """Steps 3 and 4: a plan a chunk, and the combine weights [T, M]. Collective over EP: every
        rank must call.

        meanwhile: work to do while the ranks agree, once.
        layout: in which chunks rows travel; as configured by default. half: of a step of two.
        """
        if layout is None:
            costs_exchange = self._agreement.costs_exchange(step)
            layout = self.layouts.choose(None, costs_exchange=costs_exchange)
        decision, weights_TM = None, routing.topk_weights_TK
        if step is None or not self._agreement.applies(step):
            order, exchanged_Wn = self._exchange(routing, layout, meanwhile)
            before_WE = layout.counts(exchanged_Wn)
        else:
            decision = self._agreement.decide(
                routing, step, clock=self.telemetry.clock, meanwhile=meanwhile, layout=layout
            )
            order, exchanged_Wn, before_WE = (
                decision.order,
                decision.exchanged_Wn,
                decision.before_WE,
            )
            weights_TM = decision.weights_TM
        plans = layout.plans(order, exchanged_Wn, self._group.rank)
        if step is not None:
            self.account.add(routing, decision, step)
        self._recorder.loads(self.telemetry.loads, before_WE, plans, half)
        if decision is not None and step is not None:
            self._recorder.decision(self.telemetry.decisions, routing, decision, step)
        return plans, weights_TM

    def _exchange(
        self, routing: Routing, layout: ExpertLayout, meanwhile: Callable[[], None] | None
    ) -> tuple[ExpertOrder, np.ndarray]:
        """Dropless: sort, and exchange the loads. Collective."""
        clock = self.telemetry.clock
        clock.enter(Phase.PLAN, self.layer)
        order = layout.sort(routing.topk_ids_TK)
        sent = self._collectives.bytes_sent
        assert order.numbers is not None
        if meanwhile is None:
            clock.enter_collective(Phase.CONSENSUS, self.layer)
            pending = self._dispatcher.exchange_counts(order.numbers)
        else:
            started = clock.record_arrival()
            pending = self._dispatcher.exchange_counts(order.numbers)
            clock.enter(Phase.EXPERTS, self.layer)
            run_overlapped(meanwhile, pending.wait)
            clock.enter_collective(Phase.CONSENSUS, self.layer, collective=started)
        # SYNC: all_to_all takes its splits as host integers; one copy a layer.
        exchanged_Wn = pending.wait().cpu().numpy()
        clock.sent(self._collectives.bytes_sent - sent)
        clock.enter(Phase.PLAN, self.layer)
        return order, exchanged_Wn


def _empty(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=False)
