"""Llama 4 text: chunked attention with rotary embedding, every few layers neither of the two.

Layers without rotary embedding (NoPE) attend to everything before, with queries that grow with
their position. Sigmoid of the best expert's logit multiplies the expert's input; a shared expert
without gate; layers may be dense in turn.

Of checkpoints with images (`llama4`) the text model is read, which is under a prefix of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.layers.attention import AttentionSpec
from engine.layers.query_scale import QueryScale
from engine.models.config_fields import read, read_flag
from engine.models.hf_config import attention_spec, model_spec
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, MoENames, SparseSpec
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec

_CHUNKED, _FULL = "chunked_attention", "full_attention"


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers Llama4TextConfig into a `ModelSpec`.

    Raises:
        ValueError: naming the field that does not say of each layer what it is.
    """
    router = RouterSpec(
        num_experts=read(hf_config, "num_local_experts"),
        top_k=read(hf_config, "num_experts_per_tok"),
        score="sigmoid",
        weights_on_input=True,
    )
    ffn = read(hf_config, "intermediate_size")
    sparse = SparseSpec(
        moe=MoESpec(router=router, hidden=read(hf_config, "hidden_size"), ffn=ffn),
        shared=DenseSpec(ffn=ffn),
    )
    dense = DenseSpec(ffn=read(hf_config, "intermediate_size_mlp"))
    routed, attentions = set(read(hf_config, "moe_layers")), _attentions(hf_config)
    layers = [
        LayerSpec(attention=attention, mlp=sparse if index in routed else dense)
        for index, attention in enumerate(attentions)
    ]
    return model_spec(
        hf_config,
        layers,
        rotary_dim=attentions[0].head_dim,
        names=MoENames(
            block="feed_forward", gate="router", shared="shared_expert", transposed=True
        ),
        ignored=(r"^vision_model\.", r"^multi_modal_projector\."),
    )


def _attentions(hf_config: Any) -> list[AttentionSpec]:
    """Return the attention of each layer."""
    num_layers = read(hf_config, "num_hidden_layers")
    kinds, turns = read(hf_config, "layer_types"), read(hf_config, "no_rope_layers")
    if len(kinds) != num_layers or not set(kinds) <= {_CHUNKED, _FULL}:
        raise ValueError(
            f"layer_types: {kinds!r} in config.json must have {num_layers} entries "
            f"(num_hidden_layers), each {_CHUNKED!r} or {_FULL!r}; compare it with the published "
            "config.json"
        )
    if len(turns) < num_layers:
        raise ValueError(
            f"no_rope_layers: {turns!r} in config.json must have one entry per layer, "
            f"{num_layers}; compare it with the published config.json"
        )
    bias = read_flag(hf_config, "attention_bias", False)
    plain = attention_spec(hf_config, qkv_bias=bias, out_bias=bias)
    turned = replace(
        plain,
        interleaved=True,
        qk_norm="unit" if read_flag(hf_config, "use_qk_norm", True) else "none",
    )
    fixed = replace(plain, rotary=False)
    if read_flag(hf_config, "attn_temperature_tuning", True):
        interval, strength = read(hf_config, "floor_scale"), read(hf_config, "attn_scale")
        fixed = replace(fixed, query_scale=QueryScale(interval=interval, strength=strength))
    chunk = read(hf_config, "attention_chunk_size") if _CHUNKED in kinds else None
    return [
        replace(turned if turn else fixed, chunk=chunk if kind == _CHUNKED else None)
        for kind, turn in zip(kinds, turns[:num_layers], strict=True)
    ]
