"""Mixtral (arXiv 2401.04088): every layer routed, top-k weights always normalised."""

from __future__ import annotations

from typing import Any

from engine.layers.attention import AttentionSpec
from engine.models.spec import LayerSpec, ModelSpec, MoENames, SparseSpec
from engine.moe.layer import MoESpec
from engine.moe.router import RouterSpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers MixtralConfig into a `ModelSpec`."""
    heads = hf_config.num_attention_heads
    head_dim = hf_config.head_dim or hf_config.hidden_size // heads
    layer = LayerSpec(
        attention=AttentionSpec(
            hidden=hf_config.hidden_size,
            num_heads=heads,
            num_kv_heads=hf_config.num_key_value_heads,
            head_dim=head_dim,
            window=hf_config.sliding_window,
        ),
        mlp=SparseSpec(
            moe=MoESpec(
                router=RouterSpec(
                    num_experts=hf_config.num_local_experts,
                    top_k=hf_config.num_experts_per_tok,
                    normalize=True,
                ),
                hidden=hf_config.hidden_size,
                ffn=hf_config.intermediate_size,
            )
        ),
    )
    return ModelSpec(
        vocab_size=hf_config.vocab_size,
        hidden=hf_config.hidden_size,
        norm_eps=hf_config.rms_norm_eps,
        tied_embeddings=hf_config.tie_word_embeddings,
        rotary_dim=head_dim,
        layers=(layer,) * hf_config.num_hidden_layers,
        names=MoENames(block="block_sparse_moe", w1="w1", w3="w3", w2="w2"),
    )
