"""Qwen2-MoE (Qwen1.5-MoE-A2.7B and kin): a shared expert behind a sigmoid gate, biased qkv.

`routed_layers` and `dense_spec` are shared with Qwen3-MoE (`qwen3_moe.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.models.config_fields import read, read_optional
from engine.models.hf_config import attention_spec, model_spec, moe_spec, window_of
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, MoENames, SparseSpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers Qwen2MoeConfig into a `ModelSpec`."""
    attention = attention_spec(hf_config, qkv_bias=read(hf_config, "qkv_bias"))
    sliding = replace(attention, window=window_of(hf_config))
    shared_ffn = read(hf_config, "shared_expert_intermediate_size")

    def mlp(routed: bool) -> DenseSpec | SparseSpec:
        if not routed:
            return dense_spec(hf_config)
        return SparseSpec(
            moe=moe_spec(hf_config, ffn=read(hf_config, "moe_intermediate_size")),
            shared=DenseSpec(ffn=shared_ffn) if shared_ffn else None,
            shared_gate=bool(shared_ffn),
        )

    # Which layers have a sliding window follows from use_sliding_window and max_window_layers;
    # transformers lists them in layer_types.
    kinds, is_routed = read(hf_config, "layer_types"), routed_layers(hf_config)
    if len(kinds) != len(is_routed):
        raise ValueError(
            f"layer_types = {kinds!r} in config.json: must have one entry per layer, "
            f"{len(is_routed)}; compare it with the published config.json"
        )
    layers = [
        LayerSpec(
            attention=sliding if kind == "sliding_attention" else attention,
            mlp=mlp(routed),
        )
        for kind, routed in zip(kinds, is_routed, strict=True)
    ]
    names = MoENames(shared="shared_expert")
    # Without a shared expert, which size 0 means, its gate multiplies nothing.
    ignored = () if shared_ffn else (r"\.mlp\.shared_expert_gate\.weight$",)
    return model_spec(
        hf_config, layers, rotary_dim=attention.head_dim, names=names, ignored=ignored
    )


def routed_layers(hf_config: Any) -> list[bool]:
    """Return for each layer whether it is routed.

    That is every decoder_sparse_step-th, without those in mlp_only_layers.
    """
    num_experts, step = read(hf_config, "num_experts"), read(hf_config, "decoder_sparse_step")
    dense = read_optional(hf_config, "mlp_only_layers") or ()
    return [
        num_experts > 0 and index not in dense and (index + 1) % step == 0
        for index in range(read(hf_config, "num_hidden_layers"))
    ]


def dense_spec(hf_config: Any) -> DenseSpec:
    """Return the feed-forward of a layer that is not routed."""
    return DenseSpec(ffn=read(hf_config, "intermediate_size"))
