"""Qwen3-Next (80B-A3B): gated DeltaNet in most layers, output-gated attention in the others.

A part of each head is rotated, the norms' weights are stored as what is above 1, and a shared
expert stands behind a sigmoid gate. `hybrid_spec` is shared with Qwen3.5 (`qwen3_5_moe.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.layers.gated_delta import GatedDeltaSpec
from engine.models.config_fields import read
from engine.models.families.qwen2_moe import dense_spec, routed_layers
from engine.models.hf_config import attention_spec, model_spec, moe_spec, partial_rotary_dim
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, MoENames, SparseSpec

_LINEAR, _FULL = "linear_attention", "full_attention"


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers Qwen3NextConfig into a `ModelSpec`.

    Raises:
        ValueError: naming layer_types or linear_num_value_heads where they describe no such model.
    """
    return hybrid_spec(
        hf_config,
        by_key_head=True,
        normalize=read(hf_config, "norm_topk_prob"),
        is_routed=routed_layers(hf_config),
    )


def hybrid_spec(
    hf_config: Any, *, by_key_head: bool, normalize: bool, is_routed: Sequence[bool]
) -> ModelSpec:
    """Return the model of Qwen3-Next and Qwen3.5.

    Args:
        by_key_head: how the files hold the projections of linear attention, see `GatedDeltaSpec`.
        normalize: whether the weights of a token's experts sum to 1.
        is_routed: of each layer.

    Raises:
        ValueError: see `read_spec`.
    """
    bias = read(hf_config, "attention_bias")
    full = attention_spec(
        hf_config,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        norm_offset=1.0,
        output_gate=True,
    )
    attention = {_LINEAR: _linear_spec(hf_config, by_key_head), _FULL: full}

    def mlp(routed: bool) -> DenseSpec | SparseSpec:
        if not routed:
            return dense_spec(hf_config)
        ffn, shared = (
            read(hf_config, f"{name}_intermediate_size") for name in ("moe", "shared_expert")
        )
        return SparseSpec(
            moe=moe_spec(hf_config, ffn=ffn, normalize=normalize),
            shared=DenseSpec(ffn=shared) if shared else None,
            shared_gate=bool(shared),
        )

    layers = [
        LayerSpec(attention=attention[kind], mlp=mlp(routed))
        for kind, routed in zip(_layer_kinds(hf_config), is_routed, strict=True)
    ]
    return model_spec(
        hf_config,
        layers,
        rotary_dim=partial_rotary_dim(hf_config, full.head_dim),
        partial_rotary=True,
        norm_offset=1.0,
        names=MoENames(shared="shared_expert"),
        # Heads for multi-token prediction, and what sees images.
        ignored=(r"^mtp\.", r"^model\.visual\."),
    )


def _linear_spec(hf_config: Any, by_key_head: bool) -> GatedDeltaSpec:
    """Return gated DeltaNet with the shape that a configuration gives."""
    keys = read(hf_config, "linear_num_key_heads")
    values = read(hf_config, "linear_num_value_heads")
    if values % keys:
        raise ValueError(
            f"linear_num_value_heads = {values} in config.json: must be a multiple of "
            f"linear_num_key_heads = {keys}; compare it with the published config.json"
        )
    return GatedDeltaSpec(
        hidden=read(hf_config, "hidden_size"),
        num_key_heads=keys,
        num_value_heads=values,
        key_dim=read(hf_config, "linear_key_head_dim"),
        value_dim=read(hf_config, "linear_value_head_dim"),
        conv_width=read(hf_config, "linear_conv_kernel_dim"),
        norm_eps=read(hf_config, "rms_norm_eps"),
        by_key_head=by_key_head,
    )


def _layer_kinds(hf_config: Any) -> list[str]:
    """Return the kind of attention of each layer."""
    kinds, num_layers = read(hf_config, "layer_types"), read(hf_config, "num_hidden_layers")
    if len(kinds) != num_layers or not set(kinds) <= {_LINEAR, _FULL} or _FULL not in kinds:
        raise ValueError(
            f"layer_types = {kinds!r} in config.json: must have {num_layers} entries "
            f"(num_hidden_layers), each {_LINEAR!r} or {_FULL!r}, at least one the latter; compare "
            "it with the published config.json"
        )
    return kinds
