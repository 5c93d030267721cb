"""Hugging Face configuration: the checks and the parts of a `ModelSpec` that families share.

Used by the family files (`families/`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from engine.layers.attention import AttentionSpec
from engine.models.config_fields import read, read_flag, read_optional
from engine.models.spec import LayerSpec, ModelSpec
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec
from engine.weights.formats.scheme import read_scheme


def attention_spec(hf_config: Any, **family: Any) -> AttentionSpec:
    """Return grouped-query attention with the shape that a configuration gives.

    family: the other fields of `AttentionSpec`.
    """
    heads, hidden = read(hf_config, "num_attention_heads"), read(hf_config, "hidden_size")
    return AttentionSpec(
        hidden=hidden,
        num_heads=heads,
        num_kv_heads=read(hf_config, "num_key_value_heads"),
        head_dim=read_optional(hf_config, "head_dim") or hidden // heads,
        norm_eps=read(hf_config, "rms_norm_eps"),
        **family,
    )


def window_of(hf_config: Any) -> int | None:
    """Return the sliding window, or None where the configuration means that there is none.

    That is null, but also 0 and negative numbers, which transformers' own configurations and other
    exporters write for it: a window without keys is none.
    """
    window = read_optional(hf_config, "sliding_window")
    return window if window is not None and window > 0 else None


def partial_rotary_dim(hf_config: Any, head_dim: int) -> int:
    """Return the rotated dims of a head, of which partial_rotary_factor is the share.

    Raises:
        ValueError: naming partial_rotary_factor where that is no even number of dims of the head.
    """
    factor = (hf_config.rope_parameters or {}).get("partial_rotary_factor") or 1.0
    rotary_dim = int(head_dim * factor)
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(
            f"partial_rotary_factor = {factor} in config.json rotates {rotary_dim} of a head's "
            f"{head_dim} dims: must be an even number from 2 to {head_dim}; compare it with the "
            "published config.json"
        )
    return rotary_dim


def moe_spec(hf_config: Any, ffn: int, normalize: bool | None = None) -> MoESpec:
    """Return the routed experts of OLMoE and Qwen: softmax scores, normalised if norm_topk_prob.

    normalize: what the family does instead of what norm_topk_prob says.
    """
    router = RouterSpec(
        num_experts=read(hf_config, "num_experts"),
        top_k=read(hf_config, "num_experts_per_tok"),
        normalize=read(hf_config, "norm_topk_prob") if normalize is None else normalize,
    )
    return MoESpec(router=router, hidden=read(hf_config, "hidden_size"), ffn=ffn)


def model_spec(
    hf_config: Any,
    layers: Iterable[LayerSpec],
    *,
    rotary_dim: int,
    partial_rotary: bool = False,
    **family: Any,
) -> ModelSpec:
    """Return a model of these layers, with the fields that every configuration has.

    Args:
        rotary_dim: rotated dims of a head.
        partial_rotary: whether the family has `rotary_dim` from `partial_rotary_dim`.
        family: the other fields of `ModelSpec`.

    Raises:
        ValueError: naming partial_rotary_factor where the family rotates whole heads.
    """
    rope = hf_config.rope_parameters
    factor = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    if not partial_rotary and factor not in (None, 1.0):
        raise ValueError(
            f"partial_rotary_factor: {factor} in config.json is not supported, only 1.0: in "
            f"{hf_config.model_type} models the whole head is rotated"
        )
    return ModelSpec(
        vocab_size=read(hf_config, "vocab_size"),
        hidden=read(hf_config, "hidden_size"),
        norm_eps=read(hf_config, "rms_norm_eps"),
        tied_embeddings=read_flag(hf_config, "tie_word_embeddings", False),
        rotary_dim=rotary_dim,
        layers=tuple(layers),
        **family,
    )


def check_config(hf_config: Any, activations: Collection[str] = ("silu", "swish")) -> None:
    """Check the settings that no family supports.

    activations: what the family takes as hidden_act.

    Raises:
        ValueError: naming the field of config.json, its value and the rule.
    """
    if read(hf_config, "hidden_act") not in activations:
        takes = " or ".join(repr(each) for each in activations if each != "swish")
        raise ValueError(
            f"hidden_act: {hf_config.hidden_act!r} in config.json is not supported, only {takes}: "
            "the family's experts are computed with no other activation"
        )
    check_common(hf_config)


def check_common(hf_config: Any) -> None:
    """Check the settings that no model supports, whoever builds it.

    Raises:
        ValueError: naming the field of config.json, its value and the rule.
    """
    if not getattr(hf_config, "is_causal", True):  # any false value counts for transformers
        raise ValueError(
            f"is_causal: {hf_config.is_causal!r} in config.json is not supported: a token would "
            "attend to later ones, and this engine only generates; use a causal checkpoint"
        )
    quantization = getattr(hf_config, "quantization_config", None)
    if quantization is not None:
        if hasattr(quantization, "to_dict"):
            quantization = quantization.to_dict()
        if not isinstance(quantization, dict):
            raise ValueError(
                f"quantization_config: {quantization!r} in config.json is no object; use the "
                "config.json that the checkpoint was published with"
            )
        read_scheme(quantization)
