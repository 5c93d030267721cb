"""OLMoE (arXiv 2409.02060): every layer routed, norms over the whole query and key projection."""

from __future__ import annotations

from typing import Any

from engine.models.config_fields import read, read_optional
from engine.models.hf_config import attention_spec, model_spec, moe_spec
from engine.models.spec import LayerSpec, ModelSpec, SparseSpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers OlmoeConfig into a `ModelSpec`."""
    attention = attention_spec(
        hf_config,
        qkv_bias=read(hf_config, "attention_bias"),
        out_bias=read(hf_config, "attention_bias"),
        qk_norm="projection",
        clip_qkv=read_optional(hf_config, "clip_qkv"),
    )
    mlp = SparseSpec(moe=moe_spec(hf_config, ffn=read(hf_config, "intermediate_size")))
    layers = [LayerSpec(attention=attention, mlp=mlp)] * read(hf_config, "num_hidden_layers")
    return model_spec(hf_config, layers, rotary_dim=attention.head_dim)
