"""The Mixture-of-Experts layer, expert-parallel. Read this file first.

One call on every rank of the expert-parallel group, whatever tokens each has (none is fine):

    1. scatter   tensor ranks have the same tokens: each takes its part     token_shard.py
    2. route     gate -> scores, top-k experts, combine weights             router.py
    3. agree     overloaded experts drop, idle ones are filled, and every   layer_agreement.py,
                 rank learns what every rank sends to every expert          agreement.py
                 where experts have copies: which rows these compute        placement/,
                                                                            copies_agreement.py
    4. plan      which row goes where, frozen; one plan per chunk           plan.py,
                                                                            chunk_layout.py
    5. dispatch  all-to-all of rows to the ranks of their experts, one      pipeline.py,
                 for all experts of a rank where that moves less            dedup.py, payload.py
    6. experts   the local experts' feed-forward                            local_experts.py
    7. combine   all-to-all back, then each token sums its experts' rows    pipeline.py
                 by weight, k = 0 .. K - 1, then its extras
    8. shared    tokens are added by the weights of their zero experts,   zero_experts.py
                 which no step between saw (`router.py`); then the
                 shared expert, if there is one, is added (it ran
                 during step 3, or where it is balanced during steps 5
                 and 6); a tensor group gathers its tokens            shared_rows.py

Without a capacity policy, or in a step in which it cannot bind, step 3 only exchanges the loads.

The sum in step 7 runs on the token's own rank in the router's order, so a token's result does not
depend on how many ranks there are. Nor does what is dropped, under `global` consensus. With
`moe.dispatch.partial_sums` the ranks of the experts sum first, in the order of their experts: the
sum's grouping then depends on which experts share a rank, and results on the ranks by rounding.

Legend: T tokens of the tensor group, t tokens of this rank, D model dim, K top-k, M columns of the
decision (K, with extras one more per local expert), E experts, e experts on this rank, S rows sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from engine.config import CapacityConfig, MoEConfig
from engine.distributed.collectives import GroupCollectives
from engine.distributed.groups import Topology
from engine.layers.mlp import DenseMLP
from engine.layers.precision import compute_dtype
from engine.moe.backend_choice import choose_backend
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.chunk_tuner import ChunkTuner, Trial
from engine.moe.dispatch.exchange import Exchange
from engine.moe.dispatch.layout_policy import LayoutPolicy
from engine.moe.dispatch.pipeline import Pipeline
from engine.moe.dispatch.row_format import RowFormats
from engine.moe.dispatch.shared_rows import SharedWork, shared_rows
from engine.moe.dispatch.two_batch import Steps, run_to_end
from engine.moe.expert_form import ExpertForm
from engine.moe.expert_rows import ExpertRows
from engine.moe.layer_agreement import LayerAgreement
from engine.moe.local_experts import LocalExperts
from engine.moe.low_bit_experts import ExpertLayouts
from engine.moe.placement.instances import Instances
from engine.moe.placement.placement import LayerPlacement, Precision
from engine.moe.placement.row_split import SplitRule
from engine.moe.router import RouterSpec, Routing, gate_logits, route, route_by_table
from engine.moe.stats import DropStats
from engine.moe.step import MoEStep
from engine.moe.token_shard import TokenShard
from engine.ops.permute import combine_rows
from engine.ops.zero_experts import add_zero_experts
from engine.profiling.phase_clock import Phase
from engine.profiling.telemetry import Telemetry


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """Shapes of a family's MoE layer."""

    router: RouterSpec
    hidden: int  # D
    ffn: int  # F, the experts' hidden dim
    experts: ExpertForm = ExpertForm()

    @property
    def width(self) -> int:
        """Numbers of a dispatched row: the model dim, or the experts' latent width."""
        return self.experts.latent or self.hidden


class MoELayer(nn.Module):
    """Routed experts distributed over `topology.expert`, plus an optional shared expert, which
    every rank has.

    Args:
        spec: shapes and routing.
        layer: the layer's index.
        topology: the groups of this rank.
        config: moe.
        device, dtype: of the experts' weights.
        shared: the shared expert; a DenseMLP where moe.shared_expert is balanced.
        row_buffers: shared by the layers of a model.
        tuner: shared by the layers of a model, for moe.overlap.chunks: auto.
        exchange: the all-to-alls; by default those of `topology.expert`.
        placement: of the layer's experts; None: contiguous homes.
        precision: of the copies.
        speeds_W: relative speed of each rank, by which rows are split over copies; None: equal.
        layouts: how the experts are held in few bits; None: in `dtype`.

    Weights are allocated uninitialised.

    Raises:
        ValueError: more expert-parallel ranks than experts, a backend that cannot run here, or
            moe.shared_expert is balanced and there is none, or its rows are not those of the
            experts.
    """

    gate_weight_ED: nn.Parameter  # float32 where the logits are, else what the model computes in
    gate_bias_E: nn.Parameter | None  # float32, the correction bias
    logit_bias_E: nn.Parameter | None  # of the gate, in the dtype of its weights
    expert_scale_E: nn.Parameter | None  # float32, multiplies the combine weights
    table_VK: nn.Parameter | None  # int64, the experts of each token id
    experts: LocalExperts  # of this rank's instances
    row_limit: int | None = None  # rows that a rank may receive at once, equal on every rank; more
    # come in rounds (`rounds.py`); None: no limit

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
        row_buffers: RowBuffers | None = None,
        tuner: ChunkTuner | None = None,
        exchange: Exchange | None = None,
        placement: LayerPlacement | None = None,
        precision: Precision = "model",
        speeds_W: tuple[int, ...] | None = None,
        layouts: ExpertLayouts | None = None,
    ) -> None:
        super().__init__()
        num_experts, group = spec.router.num_experts, topology.expert
        if group.size > num_experts:
            raise ValueError(
                f"parallel.expert: {group.size} exceeds the model's {num_experts} experts; start "
                f"at most {num_experts} ranks or set parallel.expert to a divisor of the ranks"
            )
        if config.shared_expert == "balanced" and (
            spec.experts.latent is not None or spec.router.weights_on_input
        ):
            raise ValueError(
                "moe.shared_expert = balanced: this model's experts take other rows than its "
                "shared expert (latent ones, or rows multiplied by their weights), which then "
                "cannot travel with them; set moe.shared_expert to replicated"
            )
        self.spec = spec
        self.layer = layer
        self.telemetry = Telemetry()
        self.row_buffers = row_buffers or RowBuffers()
        self._group = group
        placement = placement or LayerPlacement.contiguous(num_experts, group.size)
        instances = Instances(placement, group.size)
        exchange = exchange or Exchange(group, GroupCollectives(topology.counts))
        self._collectives = exchange.collectives
        wide = compute_dtype(dtype, device)
        rows = RowFormats.of(spec.width, wide, config.dispatch)
        self.layout_policy = LayoutPolicy(
            instances.first_instances,
            spec.router.top_k,
            rows,
            config,
            group.link,
            shared_rows(config, shared, spec.ffn, group.rank),
        )
        control = GroupCollectives(topology.control)
        self.layout_policy.tune(layer, tuner or ChunkTuner(device), control)
        self._token_shard = TokenShard(topology.tensor)
        gate_dtype = torch.float32 if spec.router.float32_logits else wide
        logits = 0 if spec.router.external else spec.router.num_logits
        self.gate_weight_ED = _empty(logits, spec.hidden, device=device, dtype=gate_dtype)
        self.gate_bias_E = (
            _empty(logits, device=device, dtype=torch.float32)
            if spec.router.correction_bias
            else None
        )
        self.logit_bias_E = (
            _empty(logits, device=device, dtype=gate_dtype) if spec.router.logit_bias else None
        )
        self.expert_scale_E = (
            _empty(num_experts, device=device, dtype=torch.float32)
            if spec.router.expert_scale
            else None
        )
        self.table_VK = None
        if spec.router.token_table is not None:
            shape = (spec.router.token_table, spec.router.top_k)
            self.table_VK = _empty(*shape, device=device, dtype=torch.int64)
        widths = (spec.width, spec.ffn)
        num_homes = instances.num_homes(group.rank)
        self.experts = LocalExperts(
            num_homes,
            len(instances.local_experts(group.rank)) - num_homes,
            precision,
            hidden=spec.width,
            ffn=spec.ffn,
            backend=(
                choose_backend(config.experts.backend, device, dtype, widths)
                if layouts is None
                else "torch"
            ),
            device=device,
            dtype=dtype,
            layouts=layouts,
            form=spec.experts,
        )
        self.rows = ExpertRows(
            spec.hidden, spec.experts.latent, spec.router.weights_on_input, device, dtype
        )
        self.shared = shared
        self._pipelines = [  # one per micro-batch
            Pipeline(exchange, self.experts, buffers, layer, shared)
            for buffers in (self.row_buffers, self.row_buffers.second)
        ]
        copies = config.copies
        self.agreement = LayerAgreement(
            spec.router,
            layer=layer,
            instances=instances,
            rule=SplitRule(
                self.experts.copy_layouts is not None, copies.target, copies.min_rows, speeds_W
            ),
            policy=self.layout_policy,
            collectives=self._collectives,
            rank=group.rank,
            ranks=group.ranks,
            config=config.capacity,
        )

    @property
    def instances(self) -> Instances:
        """Homes and copies of the layer's experts."""
        return self.agreement.instances

    @property
    def local_experts(self) -> list[int]:
        """The experts of this rank's instances."""
        return self.agreement.local_experts

    def set_instances(self, instances: Instances) -> None:
        """Use other copies, between steps and alike on every rank; their weights are in place.

        Homes stay, and every rank has as many copies as before.
        """
        self.agreement.set_instances(instances)

    def finalize_weights(self) -> None:
        """Change the loaded weights to the layout that is read fastest, in place."""
        self.experts.finalize_weights()
        self.rows.finalize_weights()
        if isinstance(self.shared, DenseMLP):
            self.shared.finalize_weights()

    @property
    def backend(self) -> str:
        """The experts backend in use."""
        return self.experts.name

    @property
    def drops(self) -> DropStats:
        """What capacity did to this rank's tokens."""
        return self.agreement.stats.drops

    @property
    def num_chunks(self) -> int:
        """The largest number of chunks of any call."""
        return self.layout_policy.num_chunks

    @property
    def max_collectives(self) -> int:
        """Upper bound of the collectives per step that the phase clock enters."""
        policy = self.layout_policy
        gathers = (2 if policy.two_batch else 1) * self._token_shard.num_collectives
        return policy.max_collectives + gathers

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank has sent to other ranks in this layer's collectives."""
        return self._collectives.bytes_sent

    @property
    def num_collectives(self) -> int:
        """Collectives this layer has called."""
        return self._collectives.num_collectives

    def reserve(self, send_rows: int, received_rows: int) -> None:
        """Allocate the row buffers for at most so many assignments sent and received in a call.

        Layers that share row buffers need it once.
        """
        if self.layout_policy.moves_shared:  # at most one per token of the largest rank more
            received_rows += -(-send_rows // self.spec.router.top_k)
        sizes = self.layout_policy.buffer_sizes(send_rows, received_rows)
        self.row_buffers.reserve(sizes, self.gate_weight_ED.device)

    def set_capacity(self, config: CapacityConfig) -> None:
        """Change the capacity policy, between steps and alike on every rank.

        Raises:
            ValueError: settings that this model or number of ranks cannot honour.
        """
        self.agreement.set_capacity(config)

    def forward(
        self,
        x_TD: torch.Tensor,
        step: MoEStep | None = None,
        group_tokens: int | None = None,
        token_ids_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the layer's output [T, D] in x's dtype. See `steps` for the arguments.

        Collective over EP: every rank must call, T may be 0.
        """
        return run_to_end(self.steps(x_TD, step, group_tokens, token_ids_T=token_ids_T))

    def steps(
        self,
        x_TD: torch.Tensor,
        step: MoEStep | None = None,
        group_tokens: int | None = None,
        micro_batch: int | None = None,
        tunes: bool = True,
        uses_copies: bool = True,
        token_ids_T: torch.Tensor | None = None,
        routing: Routing | None = None,
    ) -> Steps[torch.Tensor]:
        """Generator form of `forward` for two-batch overlap: yields while rows are in flight.

        Collective over EP: every rank must call.

        Args:
            x_TD: T may be 0.
            step: which of this rank's tokens are subject to capacity; None: none.
            group_tokens: tokens of all ranks in this step, equal on every rank: few are not cut
                into chunks, nor deduplicated. None: as configured.
            micro_batch: 0 or 1 in a step of two, None for a whole step, which never yields.
            tunes: see `LayoutPolicy.begin_trial`.
            uses_copies: whether rows may move to copies, the same on every rank.
            token_ids_T: int64, read where the router's spec has a token_table.
            routing: of this rank's tokens, if and only if the router is external.
        """
        clock = self.telemetry.clock
        x_tD = self._token_shard.scatter(x_TD)
        assert (routing is not None) == self.spec.router.external, "routing and spec disagree"
        if routing is None:
            clock.enter(Phase.GATE, self.layer, x_tD.shape[0])
            routing = self.route(x_tD, token_ids_T)
        shared = None if self.shared is None else SharedWork(self.shared, x_tD)
        own_tD, zero_t = x_tD, routing.zero_weight_T
        x_tD = self.rows.before(x_tD, routing, self.expert_scale_E)
        trial = Trial(1)
        if micro_batch is None:
            trial = self.layout_policy.begin_trial(group_tokens, tunes)
        layout = self.layout_policy.choose(
            group_tokens, trial.chunks, costs_exchange=self.agreement.costs_exchange(step)
        )
        pipeline = self._pipelines[micro_batch or 0]
        on_order = None
        if layout.sends_plain_rows and not self.agreement.adds_extras:
            on_order = partial(pipeline.pack, x_tD, clock)
        # Which shared rows stay follows from the counts, where some may move.
        early, late = (None if shared is None else shared.run), None
        if layout.moves_shared:
            early, late = None, early
        decision, plans = self.agreement.agree(
            routing, step, self.telemetry, early, layout, micro_batch, on_order, uses_copies
        )
        if self.rows.weights_on_input:
            decision = self.rows.counted_once(decision)
        elif self.expert_scale_E is not None:
            decision = self.agreement.scaled(decision, self.expert_scale_E)
        with trial:
            terms = plans[0].terms(decision.weights_TM)
            moves = plans[0].shared_moves
            rounds = self.agreement.plan_rounds(
                decision, layout, self.row_limit, group_tokens, micro_batch
            )
            if rounds:
                moves = None
                terms = decision.order.slot_TK, decision.weights_TM
                if late is not None:
                    late()
                rows_SD = pipeline.rounds(x_tD, decision.weights_TM, rounds, clock)
            else:
                rows_SD = yield from pipeline.steps(
                    x_tD,
                    decision.weights_TM,
                    plans,
                    clock,
                    yields=micro_batch is not None,
                    packed=on_order is not None,
                    overlap=None if late is None else partial(late, moves),
                )
            if self.layout_policy.moves_shared:
                moved = 0 if moves is None else moves.num_moved_all
                self.telemetry.loads.add_shared(self.layer, moved)
            clock.enter(Phase.PLAN, self.layer)
            out_tD = self.rows.after(combine_rows(rows_SD, *terms))
            if zero_t is not None:
                out_tD = add_zero_experts(out_tD, own_tD, zero_t)
        if shared is not None:
            out_tD = shared.add_to(out_tD)
        out_TD = self._token_shard.gather(out_tD, x_TD.shape[0], clock, self.layer)
        clock.enter(Phase.OTHER, self.layer)
        return out_TD

    def route(self, x_tD: torch.Tensor, token_ids_T: torch.Tensor | None = None) -> Routing:
        """Step 2: return the scores, experts and combine weights of this rank's tokens.

        token_ids_T: of the tensor group's tokens; see `steps`.
        """
        logits_tE = gate_logits(x_tD, self.gate_weight_ED, self.spec.router, self.logit_bias_E)
        if self.table_VK is not None:
            assert token_ids_T is not None, "a layer with a token table needs token ids"
            token_ids_t = self._token_shard.scatter(token_ids_T)
            return route_by_table(logits_tE, self.spec.router, self.table_VK, token_ids_t)
        return route(logits_tE, self.spec.router, self.gate_bias_E)


def _empty(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype), requires_grad=False)
