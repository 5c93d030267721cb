"""From a Hugging Face configuration to a model: which family reads which `model_type`.

The runner calls it once, on every rank:

    hf_config = transformers.AutoConfig.from_pretrained(path)
    model = build_model(hf_config, config, topology, device, dtype)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.config import Config
from engine.distributed.groups import Topology
from engine.layers.rotary import RotaryTable
from engine.models import deepseek_v2, deepseek_v3, mixtral, olmoe, qwen2_moe, qwen3_moe
from engine.models.decoder import CausalLM
from engine.models.spec import ModelSpec, check_config

_FAMILIES: dict[str, Callable[[Any], ModelSpec]] = {
    "mixtral": mixtral.read_spec,
    "olmoe": olmoe.read_spec,
    "qwen2_moe": qwen2_moe.read_spec,
    "qwen3_moe": qwen3_moe.read_spec,
    "deepseek_v2": deepseek_v2.read_spec,
    "deepseek_v3": deepseek_v3.read_spec,
}


def supported_model_types() -> tuple[str, ...]:
    """The values of `model_type` in config.json that this engine runs."""
    return tuple(_FAMILIES)


def read_spec(hf_config: Any) -> ModelSpec:
    """Return the `ModelSpec` of a transformers configuration.

    Raises:
        ValueError: on a model type without a family, or a field that its family cannot run.
    """
    family = _FAMILIES.get(hf_config.model_type)
    if family is None:
        raise ValueError(
            f"model_type: {hf_config.model_type!r} in config.json is not supported; supported: "
            f"{', '.join(_FAMILIES)}"
        )
    check_config(hf_config)
    return family(hf_config)


def model_length(hf_config: Any, max_model_len: int | None) -> int:
    """Return the positions to run: `model.max_model_len`, by default the checkpoint's context.

    Raises:
        ValueError: when more is asked for than the checkpoint's rotary embedding was made for.
    """
    context = hf_config.max_position_embeddings
    if max_model_len is None:
        return context
    # Only dynamic scaling is defined past the context length.
    if max_model_len > context and hf_config.rope_parameters.get("rope_type") != "dynamic":
        raise ValueError(
            f"model.max_model_len: {max_model_len} exceeds the checkpoint's context of {context} "
            f"tokens (max_position_embeddings in config.json); set it to at most {context}"
        )
    return max_model_len


def build_model(
    hf_config: Any, config: Config, topology: Topology, device: torch.device, dtype: torch.dtype
) -> CausalLM:
    """Build this rank's share of the model, its weights uninitialised.

    Raises:
        ValueError: the same on every rank, before any collective.
    """
    spec = read_spec(hf_config)
    length = model_length(hf_config, config.model.max_model_len)
    return CausalLM(
        spec,
        RotaryTable(hf_config, spec.rotary_dim, length, device, dtype),
        max_model_len=length,
        topology=topology,
        config=config.moe,
        device=device,
        dtype=dtype,
    )
