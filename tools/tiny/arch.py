"""Sizes and routing rules of the two tiny models, shared by training and export."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyArch:
    """Sizes and routing rules of one tiny model."""

    model_type: str  # "mixtral" or "olmoe"
    vocab_size: int = 2048
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    expert_hidden_size: int = 144
    norm_topk_prob: bool = True  # Mixtral divides the kept weights by their sum, OLMoE does not
    qk_norm: bool = False  # OLMoE normalises the whole query and key projections
    qk_norm_init: float = 1.7
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 512


ARCHS = {
    "mixtral": TinyArch(model_type="mixtral"),
    "olmoe": TinyArch(
        model_type="olmoe",
        num_kv_heads=8,
        num_experts=32,
        top_k=4,
        expert_hidden_size=32,
        norm_topk_prob=False,
        qk_norm=True,
    ),
}
