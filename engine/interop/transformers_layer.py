"""Transformers layer: the experts of one transformers MoE layer on the engine's dispatch.

See `transformers_ep.py` for its use. Importing this module imports transformers.

The engine's MoE layer (`engine/moe/layer.py`) runs whole but for its router: experts and combine
weights come from the model. All ranks have the same tokens, as in one tensor group: each takes its
part, and the parts are gathered at the end.

Legend: T tokens of the call, t tokens of this rank's part, D model dim, K top-k, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.distributed.expert_parallel import EPImplementation

from engine.config import MoEConfig
from engine.distributed.groups import Topology
from engine.interop.transformers_experts import experts_shape, take_weights
from engine.interop.transformers_shared import LockstepExperts
from engine.layers.precision import compute_dtype
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.layer import MoELayer
from engine.moe.router import RouterSpec, Routing
from engine.moe.spec import MoESpec
from engine.moe.stacked_experts import StackedExperts
from engine.moe.step import MoEStep
from engine.moe.token_shard import part_bounds


class RoutedLayer(MoELayer):
    """An MoE layer whose tokens come with their experts and combine weights."""

    def __init__(
        self,
        shape: StackedExperts,
        top_k: int,
        *,
        layer: int,
        topology: Topology,
        config: MoEConfig,
        dtype: torch.dtype,
        row_buffers: RowBuffers,
    ) -> None:
        """Build it, with the same arguments on every rank; no collective."""
        num_experts, device = shape.num_experts * topology.expert.size, topology.device
        spec = MoESpec(
            router=RouterSpec(num_experts=num_experts, top_k=top_k),
            hidden=shape.hidden,
            ffn=shape.ffn,
            experts=shape.form,
        )
        super().__init__(
            spec,
            layer=layer,
            topology=topology,
            config=config,
            device=device,
            dtype=dtype,
            row_buffers=row_buffers,
        )
        self.gate.weight_ED = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self._size = topology.tensor.size
        self._given: tuple[torch.Tensor, torch.Tensor] | None = None
        self._limits = False

    def apply_to(
        self, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, limits: bool
    ) -> torch.Tensor:
        """Return the experts' weighted outputs [T, D]. Collective over EP: every rank must call.

        Args:
            x_TD: in the dtype that is computed in.
            ids_TK: int64.
            weights_TK: float32.
            limits: whether the tokens are subject to capacity.
        """
        self._given, self._limits = (ids_TK, weights_TK), limits
        step = self._step(x_TD) if limits else None
        return self(x_TD, step, group_tokens=x_TD.shape[0])

    def route(self, x_tD: torch.Tensor, token_ids_T: torch.Tensor | None = None) -> Routing:
        """Return the given experts and weights of this rank's part.

        An expert that was not chosen has the score 0; one that was, its combine weight.
        """
        del token_ids_T
        assert self._given is not None
        ids_tK, weights_tK = (self._token_shard.scatter(each) for each in self._given)
        scores_tE = weights_tK  # not read where nothing may be dropped
        if self._limits:
            num_experts = self.spec.router.num_experts
            scores_tE = weights_tK.new_zeros((len(ids_tK), num_experts))
            scores_tE = scores_tE.scatter_(1, ids_tK, weights_tK)
        return Routing(scores_tE, ids_tK.contiguous(), weights_tK.contiguous())

    def _step(self, x_TD: torch.Tensor) -> MoEStep:
        """Return the call's tokens, numbered by their place among all of them."""
        bounds = [part_bounds(len(x_TD), self._size, rank) for rank in range(self._size)]
        start, end = bounds[self._group.rank]
        position_t = torch.arange(start, end, dtype=torch.int32, device=x_TD.device)
        counts = tuple(end - start for start, end in bounds)
        return MoEStep.whole(torch.zeros_like(position_t), position_t, counts)


class LockstepEP(EPImplementation):
    """Runs the experts of one module on the engine's dispatch; transformers makes one per module.

    Args:
        owner: of the settings.
        experts: whose parameters are sharded, not yet loaded.
        ep_mesh, tp_mesh: of the ranks that share the experts and the batch.

    Raises:
        ValueError: these experts, or this layout of ranks, are not served.
    """

    def __init__(self, owner: LockstepExperts, experts: nn.Module, ep_mesh: Any, tp_mesh: Any):
        world = dist.get_world_size()
        if not ep_mesh.size() == tp_mesh.size() == world:
            raise ValueError(
                f"ep_size = {ep_mesh.size()}, tp_size = {tp_mesh.size()}: Lockstep's experts need "
                f"one batch on all ranks and whole experts on each; set both to {world}, the "
                "number of ranks, and fsdp_size and pp_size to 1"
            )
        super().__init__(experts, ep_mesh, tp_mesh)
        self._owner, self._experts = owner, experts
        self._shape = experts_shape(experts)
        self._number = owner.add(self, getattr(experts, "config", None))
        self._layer: RoutedLayer | None = None
        self._topology, self._row_buffers = owner.shared(ep_mesh.device_type)

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the experts' weighted outputs [T, D]. Collective: every rank must call.

        Args:
            hidden_states: [T, D], the same on every rank, as are the others.
            top_k_index, top_k_weights: [T, K].

        Raises:
            ValueError: a gradient is asked for, an expert is out of range, or under a capacity
                policy a weight is NaN or infinite.
        """
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            raise ValueError(
                "Lockstep's experts have no backward pass; call the model under "
                'torch.inference_mode() or torch.no_grad(), or train with "all_to_all"'
            )
        # What is kept from call to call must be no inference tensor: another call may be outside
        # inference mode, where those cannot be written.
        with torch.inference_mode(False), torch.no_grad():
            layer = self._layer or self._build(top_k_index.shape[-1])
            ids_TK = top_k_index.long()
            if ids_TK.device.type == "cpu" and ids_TK.numel():
                self._check_range(int(ids_TK.amin()), int(ids_TK.amax()))
            x_TD = hidden_states.to(self._wide).contiguous()
            return layer.apply_to(x_TD, ids_TK, top_k_weights.float(), self._owner.limits)

    @property
    def layer(self) -> RoutedLayer | None:
        """The engine's layer; None before the first call."""
        return self._layer

    def _check_range(self, least: int, most: int) -> None:
        num_experts = self._shape.num_experts * self._topology.expert.size
        if least < 0 or most >= num_experts:
            raise ValueError(
                f"{type(self._experts).__name__}: the router chose expert {min(least, most)} to "
                f"{most} of {num_experts}; families that choose no expert at all for a token are "
                'not served, use ep_implementation="all_reduce"'
            )

    def _build(self, top_k: int) -> RoutedLayer:
        """Take the loaded weights over and build the layer."""
        shape = experts_shape(self._experts)  # again: loading may have changed the dtype
        device = self._topology.device
        dtype = self._experts.down_proj.dtype  # pyright: ignore[reportAttributeAccessIssue]
        self._wide = compute_dtype(dtype, device)  # pyright: ignore[reportArgumentType]
        layer = RoutedLayer(
            shape,
            top_k,
            layer=self._number,
            topology=self._topology,
            config=self._owner.config,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            row_buffers=self._row_buffers,
        )
        layer.experts.use_weights(*take_weights(self._experts, self._wide))
        layer.finalize_weights()
        self._layer = layer
        return layer
