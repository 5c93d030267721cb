"""Hugging Face configuration: the checks and the parts of a `ModelSpec` that families share.

Used by the family files (`mixtral.py`, `olmoe.py`, ...).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from engine.layers.attention import AttentionSpec
from engine.models.spec import LayerSpec, ModelSpec
from engine.moe.layer import MoESpec
from engine.moe.router import RouterSpec


def attention_spec(hf_config: Any, **family: Any) -> AttentionSpec:
    """Return grouped-query attention with the shape that a configuration gives.

    family: the other fields of `AttentionSpec`.
    """
    heads = hf_config.num_attention_heads
    return AttentionSpec(
        hidden=hf_config.hidden_size,
        num_heads=heads,
        num_kv_heads=hf_config.num_key_value_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        norm_eps=hf_config.rms_norm_eps,
        **family,
    )


def window_of(hf_config: Any) -> int | None:
    """Return the sliding window, or None where the configuration means that there is none.

    That is null, but also 0 and negative numbers, which transformers' own configurations and other
    exporters write for it: a window without keys is none.
    """
    window = hf_config.sliding_window
    return window if window is not None and window > 0 else None


def moe_spec(hf_config: Any, ffn: int) -> MoESpec:
    """Return the routed experts of OLMoE and Qwen: softmax scores, normalised if norm_topk_prob."""
    router = RouterSpec(
        num_experts=hf_config.num_experts,
        top_k=hf_config.num_experts_per_tok,
        normalize=hf_config.norm_topk_prob,
    )
    return MoESpec(router=router, hidden=hf_config.hidden_size, ffn=ffn)


def model_spec(
    hf_config: Any, layers: Iterable[LayerSpec], *, rotary_dim: int, **family: Any
) -> ModelSpec:
    """Return a model of these layers, with the fields that every configuration has.

    family: the other fields of `ModelSpec`.
    """
    return ModelSpec(
        vocab_size=hf_config.vocab_size,
        hidden=hf_config.hidden_size,
        norm_eps=hf_config.rms_norm_eps,
        tied_embeddings=hf_config.tie_word_embeddings,
        rotary_dim=rotary_dim,
        layers=tuple(layers),
        **family,
    )


def check_config(hf_config: Any) -> None:
    """Check the settings that no family supports.

    Raises:
        ValueError: naming the field of config.json, its value and the rule.
    """
    if hf_config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act: {hf_config.hidden_act!r} in config.json is not supported, only 'silu': "
            "the experts' kernels compute silu(gate) * up"
        )
    if not getattr(hf_config, "is_causal", True):  # any false value counts for transformers
        raise ValueError(
            f"is_causal: {hf_config.is_causal!r} in config.json is not supported: a token would "
            "attend to later ones, and this engine only generates; use a causal checkpoint"
        )
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ValueError(
            "quantization_config in config.json: quantized checkpoints are not supported; use one "
            "in float32, bfloat16 or float16"
        )


def require(hf_config: Any, field: str) -> Any:
    """Return a field that may be null in a configuration but that this model needs.

    Raises:
        ValueError: when it is null.
    """
    value = getattr(hf_config, field, None)
    if value is None:
        raise ValueError(f"{field} in config.json is null; this model type needs a number there")
    return value
