"""Qwen3-MoE (arXiv 2505.09388): query and key heads normalised one by one, no shared expert."""

from __future__ import annotations

from typing import Any

from engine.models.config_fields import read
from engine.models.families.qwen2_moe import dense_spec, routed_layers
from engine.models.hf_config import attention_spec, model_spec, moe_spec, window_of
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, SparseSpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers Qwen3MoeConfig into a `ModelSpec`."""
    attention = attention_spec(
        hf_config,
        qkv_bias=read(hf_config, "attention_bias"),
        out_bias=read(hf_config, "attention_bias"),
        qk_norm="head",
        window=window_of(hf_config),
    )

    def mlp(routed: bool) -> DenseSpec | SparseSpec:
        if not routed:
            return dense_spec(hf_config)
        return SparseSpec(moe=moe_spec(hf_config, ffn=read(hf_config, "moe_intermediate_size")))

    layers = [
        LayerSpec(attention=attention, mlp=mlp(routed)) for routed in routed_layers(hf_config)
    ]
    return model_spec(hf_config, layers, rotary_dim=attention.head_dim)
