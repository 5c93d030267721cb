"""Mixtral (arXiv 2401.04088): every layer routed, top-k weights always normalised."""

from __future__ import annotations

from typing import Any

from engine.models.config_fields import read
from engine.models.hf_config import attention_spec, model_spec, window_of
from engine.models.spec import LayerSpec, ModelSpec, MoENames, SparseSpec
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers MixtralConfig into a `ModelSpec`."""
    attention = attention_spec(hf_config, window=window_of(hf_config))
    router = RouterSpec(
        num_experts=read(hf_config, "num_local_experts"),
        top_k=read(hf_config, "num_experts_per_tok"),
        normalize=True,
    )
    ffn = read(hf_config, "intermediate_size")
    moe = MoESpec(router=router, hidden=read(hf_config, "hidden_size"), ffn=ffn)
    layer = LayerSpec(attention=attention, mlp=SparseSpec(moe=moe))
    layers = [layer] * read(hf_config, "num_hidden_layers")
    names = MoENames(block="block_sparse_moe", w1="w1", w3="w3", w2="w2")
    return model_spec(hf_config, layers, rotary_dim=attention.head_dim, names=names)
