"""DeepSeek-V3 (arXiv 2412.19437): V2's decoder, sigmoid scores, a bias for load balancing."""

from __future__ import annotations

from typing import Any

from engine.models.config_fields import read, read_flag, read_optional
from engine.models.families.deepseek_v2 import deepseek_spec
from engine.models.spec import ModelSpec
from engine.moe.router import RouterSpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers DeepseekV3Config into a `ModelSpec`."""
    return deepseek_spec(
        hf_config,
        sigmoid_router(hf_config),
        interleaved=read_flag(hf_config, "rope_interleave", False),
    )


def sigmoid_router(hf_config: Any) -> RouterSpec:
    """Return V3's routing, which GLM-4.5 shares: sigmoid, correction bias, groups by best two."""
    return RouterSpec(
        num_experts=read(hf_config, "n_routed_experts"),
        top_k=read(hf_config, "num_experts_per_tok"),
        score="sigmoid",
        normalize=read(hf_config, "norm_topk_prob"),
        normalize_eps=1e-20,
        scale=read(hf_config, "routed_scaling_factor"),
        num_groups=read_optional(hf_config, "n_group") or 1,
        top_groups=read_optional(hf_config, "topk_group") or 1,
        group_score="top2",
        correction_bias=True,
        float32_logits=True,
    )
