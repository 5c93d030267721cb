"""Qwen3-MoE (arXiv 2505.09388): query and key heads normalised one by one, no shared expert."""

from __future__ import annotations

from typing import Any

from engine.layers.attention import AttentionSpec
from engine.models.qwen2_moe import is_routed, moe_spec
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, SparseSpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers Qwen3MoeConfig into a `ModelSpec`."""
    heads = hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    attention = AttentionSpec(
        hidden=hf_config.hidden_size,
        num_heads=heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=head_dim,
        qkv_bias=hf_config.attention_bias,
        out_bias=hf_config.attention_bias,
        qk_norm="head",
        norm_eps=hf_config.rms_norm_eps,
        window=hf_config.sliding_window,
    )
    sparse = SparseSpec(moe=moe_spec(hf_config))
    dense = DenseSpec(ffn=hf_config.intermediate_size)
    return ModelSpec(
        vocab_size=hf_config.vocab_size,
        hidden=hf_config.hidden_size,
        norm_eps=hf_config.rms_norm_eps,
        tied_embeddings=hf_config.tie_word_embeddings,
        rotary_dim=head_dim,
        layers=tuple(
            LayerSpec(attention=attention, mlp=sparse if is_routed(hf_config, index) else dense)
            for index in range(hf_config.num_hidden_layers)
        ),
    )
