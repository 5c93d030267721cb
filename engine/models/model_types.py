"""Model types: which family reads which `model_type` of config.json, and who builds its model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from engine.models.families import (
    deepseek_v2,
    deepseek_v3,
    ernie4_5_moe,
    glm4_moe,
    gpt_oss,
    llama4,
    longcat_flash,
    minimax_m2,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
)
from engine.models.spec import ModelSpec
from engine.models.transformers_model.spec import read_spec as read_transformers_spec

Implementation = Literal["auto", "lockstep", "transformers"]  # model.implementation

FAMILIES: dict[str, Callable[[Any], ModelSpec]] = {
    "mixtral": mixtral.read_spec,
    "olmoe": olmoe.read_spec,
    "qwen2_moe": qwen2_moe.read_spec,
    "qwen3_moe": qwen3_moe.read_spec,
    "deepseek_v2": deepseek_v2.read_spec,
    "deepseek_v3": deepseek_v3.read_spec,
    "kimi_k2": deepseek_v3.read_spec,
    "glm4_moe": glm4_moe.read_spec,
    "ernie4_5_moe": ernie4_5_moe.read_spec,
    "minimax_m2": minimax_m2.read_spec,
    "gpt_oss": gpt_oss.read_spec,
    "llama4_text": llama4.read_spec,
    "llama4": llama4.read_spec,
    "qwen3_next": qwen3_next.read_spec,
    "qwen3_5_moe_text": qwen3_5_moe.read_spec,
    "qwen3_5_moe": qwen3_5_moe.read_spec,
    "longcat_flash": longcat_flash.read_spec,
}
# Model types without a class in transformers whose config.json is that of another one. Their own
# classes are code in the checkpoint, which is never run.
_READ_AS = {"kimi_k2": "deepseek_v3"}
# Model types whose config.json has the language model in text_config, and its own model type. Only
# that part is run.
TEXT_OF = {
    "qwen3_5_moe": "qwen3_5_moe_text",
    "llama4": "llama4_text",
    "aria": "aria_text",
    "glm4v_moe": "glm4v_moe_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
}


def supported_model_types() -> tuple[str, ...]:
    """Return the values of `model_type` in config.json that this engine runs."""
    return tuple(FAMILIES)


def read_as(model_type: str) -> str:
    """Return the `model_type` as which a config.json is read: of another family, or of a part."""
    return _READ_AS.get(model_type, TEXT_OF.get(model_type, model_type))


def family_module(model_type: str) -> str:
    """Return the module that reads the configurations of a `model_type` that runs."""
    family = FAMILIES.get(model_type, read_transformers_spec)
    return family.__module__


def known_model_types() -> str:
    """Return, in words, the values of `model_type` that run, in either implementation."""
    return f"{', '.join(FAMILIES)}, or of another that docs/models.md lists as running"


def uses_transformers(model_type: Any, implementation: Implementation) -> bool:
    """Return whether transformers builds the model; see model.implementation."""
    known = isinstance(model_type, str) and model_type in FAMILIES
    return implementation == "transformers" or (implementation == "auto" and not known)
