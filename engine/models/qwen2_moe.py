"""Qwen2-MoE (Qwen1.5-MoE-A2.7B and kin): a shared expert behind a sigmoid gate, biased qkv.

`is_routed` is shared with Qwen3-MoE (`qwen3_moe.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.models.hf_config import attention_spec, model_spec, moe_spec, window_of
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, MoENames, SparseSpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers Qwen2MoeConfig into a `ModelSpec`."""
    attention = attention_spec(hf_config, qkv_bias=hf_config.qkv_bias)
    sliding = replace(attention, window=window_of(hf_config))
    shared_ffn = hf_config.shared_expert_intermediate_size
    sparse = SparseSpec(
        moe=moe_spec(hf_config, ffn=hf_config.moe_intermediate_size),
        shared=DenseSpec(ffn=shared_ffn) if shared_ffn else None,
        shared_gate=bool(shared_ffn),
    )
    dense = DenseSpec(ffn=hf_config.intermediate_size)
    # Which layers have a sliding window follows from use_sliding_window and max_window_layers;
    # transformers lists them in layer_types.
    layers = [
        LayerSpec(
            attention=sliding if hf_config.layer_types[index] == "sliding_attention" else attention,
            mlp=sparse if is_routed(hf_config, index) else dense,
        )
        for index in range(hf_config.num_hidden_layers)
    ]
    names = MoENames(shared="shared_expert")
    # Without a shared expert, which size 0 means, its gate multiplies nothing.
    ignored = () if shared_ffn else (r"\.mlp\.shared_expert_gate\.weight$",)
    return model_spec(
        hf_config, layers, rotary_dim=attention.head_dim, names=names, ignored=ignored
    )


def is_routed(hf_config: Any, index: int) -> bool:
    """Return whether layer `index` is routed: every decoder_sparse_step-th, not mlp_only_layers."""
    return (
        hf_config.num_experts > 0
        and index not in (hf_config.mlp_only_layers or ())
        and (index + 1) % hf_config.decoder_sparse_step == 0
    )
