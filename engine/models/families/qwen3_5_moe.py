"""Qwen3.5 and Qwen3.6 with experts, their language model alone: Qwen3-Next in other tensors.

Every layer is routed, and the weights of a token's experts always sum to 1. Positions of text are
the same on all three axes of the rotary embedding, which then is the ordinary one.
"""

from __future__ import annotations

from typing import Any

from engine.models.config_fields import read
from engine.models.families.qwen3_next import hybrid_spec
from engine.models.spec import ModelSpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Turn a transformers Qwen3_5MoeTextConfig into a `ModelSpec`.

    Raises:
        ValueError: naming layer_types or linear_num_value_heads where they describe no such model.
    """
    is_routed = [True] * read(hf_config, "num_hidden_layers")
    return hybrid_spec(hf_config, by_key_head=False, normalize=True, is_routed=is_routed)
