"""ERNIE-4.5: softmax scores with a correction bias, shared experts without gate.

Layers from moe_layer_start_index to moe_layer_end_index are routed, every moe_layer_interval-th of
them; rotary pairs are neighbours.
"""

from __future__ import annotations

from typing import Any

from engine.models.config_fields import read, read_flag, read_optional
from engine.models.hf_config import attention_spec, model_spec
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, MoENames, SparseSpec
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers Ernie4_5_MoeConfig into a `ModelSpec`.

    Raises:
        ValueError: on use_bias, which adds a bias to the head as well.
    """
    if read_flag(hf_config, "use_bias", False):
        raise ValueError(
            "use_bias: True in config.json is not supported for ernie4_5_moe: the head would have "
            "a bias; in every published ERNIE-4.5 it is false"
        )
    attention = attention_spec(hf_config, interleaved=True)
    router = RouterSpec(
        num_experts=read(hf_config, "moe_num_experts"),
        top_k=read(hf_config, "moe_k"),
        normalize=True,
        normalize_min=read(hf_config, "moe_norm_min"),
        correction_bias=True,
        float32_logits=True,
    )
    ffn = read(hf_config, "moe_intermediate_size")
    num_shared = read_optional(hf_config, "moe_num_shared_experts") or 0
    sparse = SparseSpec(
        moe=MoESpec(router=router, hidden=read(hf_config, "hidden_size"), ffn=ffn),
        shared=DenseSpec(ffn=num_shared * ffn) if num_shared else None,
    )
    dense = DenseSpec(ffn=read(hf_config, "intermediate_size"))
    layers = [
        LayerSpec(attention=attention, mlp=sparse if is_routed else dense)
        for is_routed in _routed_layers(hf_config)
    ]
    return model_spec(
        hf_config,
        layers,
        rotary_dim=attention.head_dim,
        names=MoENames(bias="moe_statics.e_score_correction_bias", bias_rows=1),
        ignored=(r"(^|\.)mtp_",),  # multi-token prediction, which plain decoding does not use
    )


def _routed_layers(hf_config: Any) -> list[bool]:
    """Return for each layer whether it is routed."""
    first, last, every = (
        read(hf_config, f"moe_layer_{part}") for part in ("start_index", "end_index", "interval")
    )
    return [
        first <= index <= last and (index + 1) % every == 0
        for index in range(read(hf_config, "num_hidden_layers"))
    ]
