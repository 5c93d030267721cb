"""Qwen2-MoE (Qwen1.5-MoE-A2.7B and kin): a shared expert behind a sigmoid gate, biased qkv.

`is_routed` and `moe_spec` are shared with Qwen3-MoE (`qwen3_moe.py`).
"""

from __future__ import annotations

from typing import Any

from engine.layers.attention import AttentionSpec
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, MoENames, SparseSpec
from engine.moe.layer import MoESpec
from engine.moe.router import RouterSpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers Qwen2MoeConfig into a `ModelSpec`."""
    heads = hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    shared = DenseSpec(ffn=hf_config.shared_expert_intermediate_size)
    sparse = SparseSpec(moe=moe_spec(hf_config), shared=shared, shared_gate=True)
    dense = DenseSpec(ffn=hf_config.intermediate_size)

    def layer(index: int) -> LayerSpec:
        # Which layers have a sliding window follows from use_sliding_window and max_window_layers;
        # transformers lists them in layer_types.
        slides = hf_config.layer_types[index] == "sliding_attention"
        attention = AttentionSpec(
            hidden=hf_config.hidden_size,
            num_heads=heads,
            num_kv_heads=hf_config.num_key_value_heads,
            head_dim=head_dim,
            qkv_bias=hf_config.qkv_bias,
            window=hf_config.sliding_window if slides else None,
        )
        return LayerSpec(attention=attention, mlp=sparse if is_routed(hf_config, index) else dense)

    return ModelSpec(
        vocab_size=hf_config.vocab_size,
        hidden=hf_config.hidden_size,
        norm_eps=hf_config.rms_norm_eps,
        tied_embeddings=hf_config.tie_word_embeddings,
        rotary_dim=head_dim,
        layers=tuple(layer(index) for index in range(hf_config.num_hidden_layers)),
        names=MoENames(shared="shared_expert"),
    )


def is_routed(hf_config: Any, index: int) -> bool:
    """Return whether layer `index` is routed: every decoder_sparse_step-th, not mlp_only_layers."""
    return (
        hf_config.num_experts > 0
        and index not in (hf_config.mlp_only_layers or ())
        and (index + 1) % hf_config.decoder_sparse_step == 0
    )


def moe_spec(hf_config: Any) -> MoESpec:
    """Return the routed experts of a Qwen2-MoE or Qwen3-MoE configuration."""
    router = RouterSpec(
        num_experts=hf_config.num_experts,
        top_k=hf_config.num_experts_per_tok,
        normalize=hf_config.norm_topk_prob,
    )
    return MoESpec(router=router, hidden=hf_config.hidden_size, ffn=hf_config.moe_intermediate_size)
