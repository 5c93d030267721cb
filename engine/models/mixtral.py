"""Mixtral (arXiv 2401.04088): every layer routed, top-k weights always normalised."""

from __future__ import annotations

from typing import Any

from engine.models.hf_config import attention_spec, model_spec, window_of
from engine.models.spec import LayerSpec, ModelSpec, MoENames, SparseSpec
from engine.moe.layer import MoESpec
from engine.moe.router import RouterSpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers MixtralConfig into a `ModelSpec`."""
    attention = attention_spec(hf_config, window=window_of(hf_config))
    router = RouterSpec(
        num_experts=hf_config.num_local_experts, top_k=hf_config.num_experts_per_tok, normalize=True
    )
    moe = MoESpec(router=router, hidden=hf_config.hidden_size, ffn=hf_config.intermediate_size)
    layers = [LayerSpec(attention=attention, mlp=SparseSpec(moe=moe))] * hf_config.num_hidden_layers
    names = MoENames(block="block_sparse_moe", w1="w1", w3="w3", w2="w2")
    return model_spec(hf_config, layers, rotary_dim=attention.head_dim, names=names)
