"""Decoder layer: the modules of one layer of the model that every family shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from engine.config import MoEConfig
from engine.distributed.groups import Topology
from engine.layers.attention import Attention, AttentionSpec
from engine.layers.gated_delta import GatedDelta, GatedDeltaSpec
from engine.layers.kv_cache import KVSpec
from engine.layers.mla import LatentAttention
from engine.layers.mlp import DenseMLP
from engine.layers.parallel import empty_parameter
from engine.layers.precision import compute_dtype
from engine.models.spec import DenseSpec, LayerSpec
from engine.moe.dispatch.buffers import RowBuffers
from engine.moe.dispatch.chunk_tuner import ChunkTuner
from engine.moe.layer import MoELayer
from engine.moe.low_bit_experts import ExpertLayouts
from engine.moe.placement.placement import Placement


class DecoderLayer(nn.Module):
    """The modules of one layer; `CausalLM` runs them."""

    def __init__(
        self,
        spec: LayerSpec,
        *,
        layer: int,
        topology: Topology,
        config: MoEConfig,
        device: torch.device,
        dtype: torch.dtype,
        row_buffers: RowBuffers,
        tuner: ChunkTuner,
        placement: Placement | None = None,
        layouts: ExpertLayouts | None = None,
    ) -> None:
        super().__init__()
        hidden = spec.attention.hidden
        wide = compute_dtype(dtype, device)
        self.input_norm_D = empty_parameter(hidden, device=device, dtype=wide)
        self.mlp_norm_D = empty_parameter(hidden, device=device, dtype=wide)
        if isinstance(spec.attention, AttentionSpec):
            self.attention = Attention(spec.attention, topology.tensor, device, dtype)
        elif isinstance(spec.attention, GatedDeltaSpec):
            self.attention = GatedDelta(spec.attention, topology.tensor, device, dtype)
        else:
            self.attention = LatentAttention(spec.attention, topology.tensor, device, dtype)
        self.attention_name = (
            "linear_attn" if isinstance(self.attention, GatedDelta) else "self_attn"
        )
        self.parallel_dense = None
        if spec.parallel_dense is not None:
            self.parallel_dense = DenseMLP(
                hidden, spec.parallel_dense.ffn, device, dtype, bias=spec.parallel_dense.bias
            )
        if isinstance(spec.mlp, DenseSpec):
            self.mlp = DenseMLP(hidden, spec.mlp.ffn, device, dtype, bias=spec.mlp.bias)
            return
        shared = None
        if spec.mlp.shared is not None:
            ffn, bias, gate = spec.mlp.shared.ffn, spec.mlp.shared.bias, spec.mlp.shared_gate
            shared = DenseMLP(hidden, ffn, device, dtype, bias=bias, output_gate=gate)
        self.mlp = MoELayer(
            spec.mlp.moe,
            layer=layer,
            topology=topology,
            config=config,
            device=device,
            dtype=dtype,
            shared=shared,
            row_buffers=row_buffers,
            tuner=tuner,
            placement=None if placement is None else placement.layer(layer),
            precision="model" if placement is None else placement.precision,
            speeds_W=None if placement is None else placement.speeds_W,
            layouts=layouts,
        )


def cache_of(layers: Sequence[DecoderLayer]) -> KVSpec:
    """Return the cache of these layers on this rank: keys of some, recurrent states of the others.

    Layers with keys have them of one shape.
    """
    kinds = [layer.attention for layer in layers]
    cached = [each for each in kinds if not isinstance(each, GatedDelta)]
    spec = cached[0].kv_spec(len(cached))
    if len(cached) == len(kinds):
        return spec
    states = (each.state_spec() if isinstance(each, GatedDelta) else None for each in kinds)
    return replace(spec, states=tuple(states))
