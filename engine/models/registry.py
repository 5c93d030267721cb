"""Registry: how a checkpoint's config becomes a model, of whichever family reads it.

Every rank builds its own share:

    hf_config = read_config(path)
    model = build_model(hf_config, config, topology, device, dtype)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.config import Config
from engine.config.checkpoint_files import read_json_object
from engine.distributed.errors import memory_in_words
from engine.distributed.groups import Topology
from engine.layers.precision import compute_dtype
from engine.layers.rotary import RotaryTable, rope_frequencies
from engine.models.config_fields import check_fields, check_rope, explain, read
from engine.models.decoder import CausalLM
from engine.models.hf_config import check_common, check_config
from engine.models.language_model import LanguageModel
from engine.models.model_types import (
    FAMILIES,
    TEXT_OF,
    Implementation,
    known_model_types,
    read_as,
    uses_transformers,
)
from engine.models.spec import ModelSpec
from engine.models.transformers_model.experts_form import NotServed
from engine.models.transformers_model.model import TransformersModel
from engine.models.transformers_model.plug_in import plug_in
from engine.models.transformers_model.spec import read_spec as read_transformers_spec
from engine.moe.low_bit_experts import ExpertLayouts
from engine.moe.placement.placement import Placement
from engine.weights.formats.grouping import example_of
from engine.weights.formats.scheme import UnsupportedScheme

# Of these a config.json has fields beside text_config: about the files, or about the head.
_BESIDE = ("quantization_config", "tie_word_embeddings")


def read_config(folder: Path, implementation: Implementation = "auto") -> Any:
    """Return the transformers configuration of a checkpoint, after checking that it can run.

    Runs no code of the checkpoint.

    Args:
        folder: of the checkpoint.
        implementation: model.implementation.

    Raises:
        ValueError: naming model.path and what is wrong in config.json, or the versions of
            transformers that work.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        values = read_json_object(folder / "config.json")
    except ValueError as error:
        raise _refused(folder, str(error)) from error
    by_transformers = uses_transformers(values.get("model_type"), implementation)
    if problem := _problem(values, by_transformers):
        raise _refused(folder, problem)
    if by_transformers:
        plug_in()
    try:
        values = _language_model(values)
        if not by_transformers:  # its own classes check their fields
            check_fields(values)
        model_type = values["model_type"]
        if (other := read_as(model_type)) != model_type:
            values = {name: value for name, value in values.items() if name != "auto_map"}
            values["model_type"] = other
            hf_config = CONFIG_MAPPING[other].from_dict(values)
        else:
            hf_config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        if by_transformers:
            check_common(hf_config)
            read_transformers_spec(hf_config)
            return hf_config
        rotary_dim = read_spec(hf_config, implementation).rotary_dim
        check_rope(hf_config, rotary_dim)
        rope_frequencies(hf_config, rotary_dim, 1)
    except NotServed as error:
        raise _refused(folder, _not_served(values["model_type"], str(error))) from error
    except Exception as error:  # transformers computes with the values before it checks them
        if values["model_type"] not in FAMILIES:
            why = _not_served(values["model_type"], explain(error, values))
            raise _refused(folder, why) from error
        example = example_of(folder) if isinstance(error, UnsupportedScheme) else ""
        raise _refused(folder, explain(error, values) + example) from error
    return hf_config


def _language_model(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the language model, where a config.json has other parts besides."""
    if values["model_type"] not in TEXT_OF:
        return values
    if not isinstance(inner := values.get("text_config"), Mapping):
        shown = "null" if inner is None else repr(inner)
        raise ValueError(
            f"text_config = {shown} in config.json: must be an object, the fields of the language "
            "model; compare it with the published config.json"
        )
    beside = {name: values[name] for name in _BESIDE if values.get(name) is not None}
    dtypes = {name: values[name] for name in ("dtype", "torch_dtype") if name in values}
    found = {**dtypes, **inner, **beside, "model_type": values["model_type"]}
    if type(tuned := found.get("attn_temperature_tuning")) is int:  # as Llama 4 was published
        found["attn_temperature_tuning"] = bool(tuned)
    return found


def unread_parts(folder: Path) -> str:
    """Return what of a checkpoint that can run is never used, in words; "" where there is none."""
    model_type = read_json_object(folder / "config.json").get("model_type")
    if model_type not in TEXT_OF:
        return ""
    return (
        f"the checkpoint is a {model_type}: its language model alone is read and run; prompts are "
        "text, images and videos are not read"
    )


def _refused(folder: Path, why: str) -> ValueError:
    return ValueError(f"model.path = {str(folder)!r}: {why}")


def _problem(values: Mapping[str, Any], by_transformers: bool) -> str | None:
    """Return what is wrong in the text of a config.json, or None; transformers checks the rest.

    by_transformers: whether it builds the model.
    """
    from transformers import CONFIG_MAPPING

    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return None
    if by_transformers and isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        return None
    has = "no model_type" if model_type is None else f"model_type = {model_type!r}"
    known = known_model_types() if by_transformers else ", ".join(FAMILIES)
    if not by_transformers and model_type in CONFIG_MAPPING:
        known += ", or set model.implementation to auto, with which transformers may build it"
    return (
        f"config.json has {has}, which this engine cannot run; use a checkpoint of one of {known}"
    )


def _not_served(model_type: str, why: str) -> str:
    """Return why transformers' implementation does not run a model type, and what to do."""
    what = f"use a checkpoint of one of {known_model_types()}"
    if model_type in FAMILIES:
        what = "set model.implementation to lockstep"
    return (
        f"config.json has model_type = {model_type!r}, which this engine cannot run "
        f"with transformers' implementation: {why}; {what}"
    )


def read_spec(hf_config: Any, implementation: Implementation = "auto") -> ModelSpec:
    """Return the `ModelSpec` of a transformers configuration.

    Args:
        hf_config: the configuration.
        implementation: model.implementation.

    Raises:
        ValueError: on a model type that does not run, or a field of which the same is true.
    """
    if uses_transformers(hf_config.model_type, implementation):
        check_common(hf_config)
        try:
            return read_transformers_spec(hf_config)
        except NotServed as error:
            raise ValueError(
                f"model_type: {hf_config.model_type!r} in config.json is not supported: {error}; "
                f"supported: {known_model_types()}"
            ) from error
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        raise ValueError(
            f"model_type: {hf_config.model_type!r} in config.json is not supported; supported: "
            f"{', '.join(FAMILIES)}"
        )
    check_config(hf_config)
    return family(hf_config)


def model_length(hf_config: Any, max_model_len: int | None) -> int:
    """Return the longest sequence to run: `max_model_len`, by default the checkpoint's context.

    Raises:
        ValueError: when it exceeds what the checkpoint's rotary embedding supports.
    """
    context = read(hf_config, "max_position_embeddings")
    if max_model_len is None:
        return context
    # Only dynamic scaling is defined past the context length.
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if max_model_len > context and rope.get("rope_type") != "dynamic":
        raise ValueError(
            f"model.max_model_len: {max_model_len} exceeds the checkpoint's context of {context} "
            f"tokens (max_position_embeddings in config.json); set it to at most {context}"
        )
    return max_model_len


def build_model(
    hf_config: Any,
    config: Config,
    topology: Topology,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement | None = None,
    layouts: Mapping[int, ExpertLayouts] | None = None,
) -> LanguageModel:
    """Build this rank's share of the model, its weights uninitialised.

    dtype: of the weight matrices (`layers/precision.py`).
    placement: of the experts (`resolve_placement`); None: contiguous homes.
    layouts: by layer, how experts are held in few bits.

    Raises:
        ValueError: the same on every rank, before any collective.
    """
    length = model_length(hf_config, config.model.max_model_len)
    if uses_transformers(hf_config.model_type, config.model.implementation):
        return TransformersModel(
            hf_config,
            max_model_len=length,
            topology=topology,
            config=config,
            device=device,
            dtype=dtype,
            placement=placement,
            layouts=layouts,
        )
    spec = read_spec(hf_config, "lockstep")
    with memory_in_words(
        f"model.max_model_len = {length}: a table of that many positions does not fit into memory; "
        "lower it"
    ):
        wide = compute_dtype(dtype, device)
        rotary = RotaryTable(hf_config, spec.rotary_dim, length, device, wide)
    return CausalLM(
        spec,
        rotary,
        max_model_len=length,
        topology=topology,
        config=config.moe,
        device=device,
        dtype=dtype,
        placement=placement,
        layouts=layouts,
    )
