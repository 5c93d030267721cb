"""Decoder layer: the modules of one layer of the model that every family shares."""

from __future__ import annotations

import torch
from torch import nn

from engine.config import MoEConfig
from engine.distributed.groups import Topology
from engine.layers.attention import Attention, AttentionSpec
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
        else:
            self.attention = LatentAttention(spec.attention, topology.tensor, device, dtype)
        self.beside = None
        if spec.beside is not None:
            self.beside = DenseMLP(hidden, spec.beside.ffn, device, dtype, bias=spec.beside.bias)
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
