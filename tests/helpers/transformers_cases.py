"""Families that transformers builds: tiny random checkpoints of model types without a family here.

Each has what sets it apart: multipliers, windows, groups, shared experts, latent keys.
"""

from __future__ import annotations

from typing import Any

import transformers

from tests.helpers.model_cases import Case

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_KINDS = ["sliding_attention", "full_attention"]


def _case(family: str, **settings: Any) -> Case:
    common = {"intermediate_size": 40, "num_experts_per_tok": 2, "rope_parameters": _ROPE}
    return Case(family, common | settings)


class _ByClass(Case):
    """A family whose class is in no mapping of transformers: config.json names it."""

    def config(self) -> Any:
        config = super().config()
        config.architectures = [f"{self.family}ForCausalLM"]
        return config

    def model(self) -> Any:
        family = getattr(transformers, f"{self.family}ForCausalLM")
        return family._from_config(self.config(), attn_implementation="eager")


def _by_class(family: str, **settings: Any) -> Case:
    return _ByClass(family, dict(_case(family, **settings).settings))


FOREIGN_CASES = {
    "granitemoe": _case(
        "GraniteMoe",
        num_local_experts=5,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.2,
        tie_word_embeddings=True,
    ),
    "phimoe": _case(
        "Phimoe", num_local_experts=4, sliding_window=6, attention_bias=True, lm_head_bias=True
    ),
    "hunyuan-v1-moe": _case("HunYuanMoEV1", num_experts=5, moe_topk=2, head_dim=8),
    "exaone-moe": _case(
        "ExaoneMoe",
        moe_intermediate_size=24,
        num_experts=6,
        n_group=2,
        topk_group=1,
        head_dim=8,
        sliding_window=5,
        layer_types=_KINDS,
        mlp_layer_types=["dense", "sparse"],
    ),
    "afmoe": _case(
        "Afmoe",
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_dense_layers=1,
        head_dim=8,
        num_experts=6,
        num_shared_experts=1,
        route_scale=1.7,
        sliding_window=5,
        layer_types=[*_KINDS, "full_attention"],
        mup_enabled=True,
    ),
    "cohere2-moe": Case(
        "Cohere2Moe",
        {
            "intermediate_size": 24,
            "prefix_dense_intermediate_size": 40,
            "head_dim": 8,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "sliding_window": 5,
            "layer_types": _KINDS,
            "logit_scale": 0.3,
        },
    ),
    "mistral4": _by_class(
        "Mistral4",
        moe_intermediate_size=24,
        n_routed_experts=6,
        num_key_value_heads=4,
        kv_lora_rank=16,
        q_lora_rank=20,
        qk_rope_head_dim=6,
        qk_nope_head_dim=6,
        v_head_dim=8,
        first_k_dense_replace=1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
            "partial_rotary_factor": 0.5,
        },
    ),
    "flex-olmo": _case("FlexOlmo", num_experts=5, num_experts_per_tok=3),
    "dots1": _case(
        "Dots1",
        moe_intermediate_size=24,
        n_routed_experts=6,
        n_shared_experts=1,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        sliding_window=5,
        layer_types=_KINDS[::-1],
        head_dim=8,
    ),
    "hy-v3": _case(
        "HYV3",
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=6,
        mlp_layer_types=["dense", "sparse"],
    ),
    "laguna": _case(
        "Laguna",
        head_dim=8,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=28,
        num_experts=6,
        sliding_window=5,
        layer_types=_KINDS,
        mlp_layer_types=["dense", "sparse"],
        moe_routed_scaling_factor=1.5,
        rope_parameters=dict.fromkeys(_KINDS, _ROPE),
    ),
    "solar-open": _case(
        "SolarOpen",
        head_dim=8,
        moe_intermediate_size=24,
        n_routed_experts=6,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.5,
    ),
    "aria": _case("AriaText", moe_num_experts=5, moe_topk=2, intermediate_size=24, head_dim=8),
    "beam": _case(
        "Beam",
        head_dim=8,
        moe_intermediate_size=24,
        num_experts=6,
        n_group=2,
        topk_group=1,
        sliding_window=5,
        layer_types=_KINDS,
        mlp_layer_types=["dense", "sparse"],
        rope_parameters={"sliding_attention": _ROPE, "full_attention": None},
    ),
    "minimax-m3-vl": _case(
        "MiniMaxM3VLText",
        head_dim=8,
        num_local_experts=6,
        intermediate_size=24,
        dense_intermediate_size=40,
        swiglu_limit=1.5,
        layer_types=["full_attention"] * 2,
        mlp_layer_types=["dense", "sparse"],
    ),
    # Frequencies by length: sequences are not longer than what the first choice holds for.
    "granitemoe-dynamic": _case(
        "GraniteMoe",
        num_local_experts=4,
        rope_parameters=_ROPE | {"rope_type": "dynamic", "factor": 2.0},
    ),
    "phimoe-longrope": _case(
        "Phimoe",
        num_local_experts=4,
        rope_parameters=_LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3},
    ),
    "exaone-moe-longrope": _case(
        "ExaoneMoe",
        moe_intermediate_size=24,
        num_experts=6,
        head_dim=8,
        sliding_window=5,
        layer_types=_KINDS,
        mlp_layer_types=["dense", "sparse"],
        rope_parameters=_LONGROPE,
    ),
    "mimo-v2-flash": _case(
        "MiMoV2Flash",
        head_dim=8,
        v_head_dim=6,
        num_key_value_heads=1,  # twice as many in layers with a window
        moe_intermediate_size=24,
        n_routed_experts=6,
        sliding_window=5,
        layer_types=_KINDS,
        mlp_layer_types=["dense", "sparse"],
        rope_parameters=dict.fromkeys(_KINDS, _ROPE | {"partial_rotary_factor": 0.5}),
    ),
}
