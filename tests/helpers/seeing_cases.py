"""Checkpoints that see images and whose language model transformers builds, on text."""

from __future__ import annotations

from typing import Any

from tests.helpers.model_cases import SeeingCase

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


class _Aria(SeeingCase):
    def config(self) -> Any:
        vision = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
        config = super().config()
        return type(config)(
            text_config=config.text_config,
            vision_config={**vision, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
            projector_patch_to_query_dict={4: 2},
        )


SEEING_CASES = {
    "aria": _Aria(
        "Aria", {"head_dim": 8, "moe_num_experts": 5, "moe_topk": 2, "intermediate_size": 24}
    ),
    "qwen3-vl-moe": SeeingCase(
        "Qwen3VLMoe",
        {
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "intermediate_size": 40,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
            "tie_word_embeddings": False,
            "rope_parameters": _MROPE,
        },
    ),
    "glm4v-moe": SeeingCase(
        "Glm4vMoe",
        {
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "intermediate_size": 40,
            "n_routed_experts": 6,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": _MROPE | {"partial_rotary_factor": 1.0},
        },
    ),
}
