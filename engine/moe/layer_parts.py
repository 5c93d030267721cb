"""Layer parts: what an MoE layer is made of, and what is asked of it between steps.

`layer.py` runs them.
"""

from __future__ import annotations

import torch
from torch import nn

from engine.config import CapacityConfig, MoEConfig
from engine.distributed.collectives import GroupCollectives
from engine.distributed.groups import Topology
from engine.layers.mlp import DenseMLP
from engine.layers.precision import compute_dtype
from engine.moe.backend_choice import choose_backend
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.chunk_tuner import ChunkTuner
from engine.moe.dispatch.exchange import Exchange
from engine.moe.dispatch.layout_policy import LayoutPolicy
from engine.moe.dispatch.pipeline import Pipeline
from engine.moe.dispatch.row_format import RowFormats
from engine.moe.dispatch.shared_rows import shared_rows
from engine.moe.dispatch.transports.transport import Limits, Setup
from engine.moe.expert_rows import ExpertRows
from engine.moe.gate import Gate
from engine.moe.layer_agreement import LayerAgreement
from engine.moe.layer_device import DeviceCalls
from engine.moe.layer_static import StaticCalls
from engine.moe.local_experts import LocalExperts
from engine.moe.low_bit_experts import ExpertLayouts
from engine.moe.placement.instances import Instances
from engine.moe.placement.placement import LayerPlacement, Precision
from engine.moe.placement.row_split import SplitRule
from engine.moe.spec import MoESpec
from engine.moe.stats import DropStats
from engine.moe.token_shard import TokenShard
from engine.profiling.telemetry import Telemetry


class LayerParts(nn.Module):
    """What one `MoELayer` has: gate, local experts, shared expert, pipelines, agreement.

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
        ValueError: more expert-parallel ranks than experts, a backend or transport that cannot run
            here, or moe.shared_expert is balanced and there is none, or its rows are not those of
            the experts.
    """

    gate: Gate
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
        tuner = tuner or ChunkTuner(device)
        self.layout_policy.tune(layer, tuner, control)
        self._token_shard = TokenShard(topology.tensor)
        self.gate = Gate(spec.router, spec.hidden, device, wide)
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
        transport = self.row_buffers.transports.get(  # None: counts are on the host
            Setup(
                group=group,
                device=device,
                dtype=wide,
                width=spec.width,
                first_experts=tuple(instances.first_instances),
                top_k=spec.router.top_k,
            ),
            config,
            experts=self.experts.name,
            takes_device_counts=self.experts.takes_device_counts,
            has_copies=instances.has_copies,
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
        self.static = StaticCalls(
            spec,
            layer=layer,
            config=config,
            rows=rows,
            policy=self.layout_policy,
            agreement=self.agreement,
            exchange=exchange,
            experts=self.experts,
            rank=group.rank,
            device=device,
            tuner=tuner,
        )

        self.on_device = DeviceCalls(
            transport,
            agreement=self.agreement,
            exchange=exchange,
            experts=self.experts,
            layer=layer,
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
        self.static.reset()

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

    def reserve(self, send_rows: int, received_rows: int, max_tokens: int) -> int:
        """Allocate the row buffers for at most so many assignments sent and received in a call, or
        those of the transport; return their bytes.

        Layers that share row buffers need it once. Collective over EP where there is a transport.

        Args:
            send_rows, received_rows: the same on every rank.
            max_tokens: of one rank.
        """
        if transports := self.row_buffers.transports.transports:
            limits = Limits(tokens=max_tokens, sent=send_rows, received=received_rows)
            return sum(transport.reserve(limits) for transport in transports)
        if self.layout_policy.moves_shared:  # at most one per token of the largest rank more
            received_rows += -(-send_rows // self.spec.router.top_k)
        sizes = self.layout_policy.buffer_sizes(send_rows, received_rows)
        self.row_buffers.reserve(sizes, self.gate.weight_ED.device)
        return self.row_buffers.num_bytes

    def set_capacity(self, config: CapacityConfig) -> None:
        """Change the capacity policy, between steps and alike on every rank.

        Raises:
            ValueError: settings that this model or number of ranks cannot honour.
        """
        self.agreement.set_capacity(config)
