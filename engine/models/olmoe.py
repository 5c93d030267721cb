"""OLMoE (arXiv 2409.02060): every layer routed, norms over the whole query and key projection."""

from __future__ import annotations

from typing import Any

from engine.layers.attention import AttentionSpec
from engine.models.spec import LayerSpec, ModelSpec, SparseSpec
from engine.moe.layer import MoESpec
from engine.moe.router import RouterSpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers OlmoeConfig into a `ModelSpec`."""
    heads = hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    layer = LayerSpec(
        attention=AttentionSpec(
            hidden=hf_config.hidden_size,
            num_heads=heads,
            num_kv_heads=hf_config.num_key_value_heads,
            head_dim=head_dim,
            qkv_bias=hf_config.attention_bias,
            out_bias=hf_config.attention_bias,
            qk_norm="projection",
            norm_eps=hf_config.rms_norm_eps,
            clip_qkv=hf_config.clip_qkv,
        ),
        mlp=SparseSpec(
            moe=MoESpec(
                router=RouterSpec(
                    num_experts=hf_config.num_experts,
                    top_k=hf_config.num_experts_per_tok,
                    normalize=hf_config.norm_topk_prob,
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
    )
