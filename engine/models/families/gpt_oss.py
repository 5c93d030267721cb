"""gpt-oss (arXiv 2508.10925): attention sinks, a sliding window in every other layer.

There is no shared expert. Projections, gate and experts have biases; experts bound gate and up
before an activation of their own, and are stored stacked, in MXFP4 as published.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.models.config_fields import read
from engine.models.hf_config import attention_spec, model_spec, window_of
from engine.models.spec import LayerSpec, ModelSpec, MoENames, SparseSpec
from engine.moe.expert_form import ExpertForm
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec

_WINDOW, _FULL = "sliding_attention", "full_attention"


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers GptOssConfig into a `ModelSpec`.

    Raises:
        ValueError: naming layer_types where it does not say what each layer is, or sliding_window.
    """
    bias = read(hf_config, "attention_bias")
    full = attention_spec(hf_config, qkv_bias=bias, out_bias=bias, sinks=True)
    kinds = _layer_kinds(hf_config)
    attention = {_FULL: full}
    if _WINDOW in kinds:
        attention[_WINDOW] = replace(full, window=_window(hf_config))
    # The softmax of the chosen logits is that of all, normalised over the chosen.
    router = RouterSpec(
        num_experts=read(hf_config, "num_local_experts"),
        top_k=read(hf_config, "num_experts_per_tok"),
        normalize=True,
        logit_bias=True,
    )
    experts = ExpertForm(
        activation="gpt_oss",
        bias=True,
        limit=read(hf_config, "swiglu_limit"),
        alpha=read(hf_config, "swiglu_alpha"),
    )
    hidden, ffn = read(hf_config, "hidden_size"), read(hf_config, "intermediate_size")
    mlp = SparseSpec(moe=MoESpec(router=router, hidden=hidden, ffn=ffn, experts=experts))
    return model_spec(
        hf_config,
        [LayerSpec(attention=attention[kind], mlp=mlp) for kind in kinds],
        rotary_dim=full.head_dim,
        names=MoENames(gate="router", alternating=True),
    )


def _layer_kinds(hf_config: Any) -> list[str]:
    """Return the kind of attention of each layer."""
    kinds, num_layers = read(hf_config, "layer_types"), read(hf_config, "num_hidden_layers")
    if len(kinds) != num_layers or not set(kinds) <= {_WINDOW, _FULL}:
        raise ValueError(
            f"layer_types: {kinds!r} in config.json must have {num_layers} entries "
            f"(num_hidden_layers), each {_WINDOW!r} or {_FULL!r}; compare it with the published "
            "config.json"
        )
    return kinds


def _window(hf_config: Any) -> int:
    """Return the window of the layers that have one."""
    if (window := window_of(hf_config)) is None:
        raise ValueError(
            f"sliding_window: {hf_config.sliding_window!r} in config.json must be a whole number "
            f"from 1: layer_types has layers of {_WINDOW!r}; compare it with the published "
            "config.json"
        )
    return window
