"""Config reading: a checkpoint's config.json, with everything in it that this engine cannot run.

The engine itself stops at the first problem. Here a field that is refused is replaced by what every
family runs, and the configuration is read again until nothing more is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

from engine.config.checkpoint_files import is_there, read_json_object
from engine.models.hf_config import check_config
from engine.models.model_types import Implementation, supported_model_types
from engine.models.registry import read_config

# What every family runs. Neither changes a shape.
_NEUTRAL: dict[str, Any] = {
    "hidden_act": "silu",
    "is_causal": True,
    "quantization_config": None,
    "rope_scaling": None,
    "rope_parameters": None,
}
_ROPE_TYPES = {"default", "linear", "dynamic", "yarn", "llama3", "longrope"}
# Of config.json: a field that only models with something else have -> what that is. Asked only of
# a model_type without a family here.
_FOREIGN = {
    "vision_config": "images; only text runs",
    "audio_config": "sound; only text runs",
    "index_topk": "sparse attention that an indexer chooses",
    "linear_attn_config": "linear attention of another kind than gated DeltaNet",
    "mamba_num_heads": "Mamba layers",
    "mamba_n_heads": "Mamba layers",
    "mamba_d_state": "Mamba layers",
    "conv_L_cache": "short convolutions in place of attention",
    "attn_logit_softcapping": "a soft cap on the attention's logits",
    "final_logit_softcapping": "a soft cap on the model's logits",
    "hc_mult": "several residual streams (hyper-connections)",
    "per_layer_config": "layers whose heads have different widths",
    "hidden_size_per_layer_input": "an embedding of the tokens for each layer",
    "num_kv_shared_layers": "layers that share keys and values",
}
# Kinds of layers, activations and router scores that some family has.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_MLPS = {"dense", "sparse", "moe", "hash_moe"}  # the last: a table of token ids routes
_ACTIVATIONS = {"silu", "swish", "gelu", "gelu_pytorch_tanh", "relu2"}
_SCORES = {"softmax", "sigmoid", "sqrtsoftplus"}
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(slots=True)
class ConfigReading:
    """What config.json says."""

    values: dict[str, Any]  # of the file
    problems: list[str] = field(default_factory=list)  # why it does not run
    remarks: list[str] = field(default_factory=list)
    # The transformers configuration, the fields that are refused replaced; None: it has no family,
    # or too much is wrong to know the shapes.
    hf_config: Any = None

    @property
    def text_values(self) -> Mapping[str, Any]:
        """The fields of the language model."""
        inner = self.values.get("text_config")
        return inner if isinstance(inner, dict) else self.values


def read_checkpoint_config(folder: Path, implementation: Implementation = "auto") -> ConfigReading:
    """Return what the config.json of a folder says, and all that is wrong with it.

    Args:
        folder: of the checkpoint.
        implementation: model.implementation.

    Raises:
        ValueError: there is no such folder, or no config.json that can be read.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise ValueError(
            f"DIR = {str(folder)!r}: {what}; name a folder with config.json and safetensors"
        )
    if not is_there(folder / "config.json"):
        raise ValueError(f"DIR = {str(folder)!r}: holds no config.json; name a checkpoint's folder")
    reading = ConfigReading(read_json_object(folder / "config.json"))
    try:
        reading.hf_config = read_config(folder, implementation)
    except ValueError as error:
        _collect(reading, _without_folder(error, folder), implementation)
    return reading


def _without_folder(error: ValueError, folder: Path) -> str:
    return str(error).removeprefix(f"model.path = {str(folder)!r}: ")


def _collect(reading: ConfigReading, first: str, implementation: Implementation) -> None:
    """Add all problems; the first is known."""
    repaired, problem, are_shapes_known = dict(reading.values), first, True
    with TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(len(repaired) + 1):
            if problem in reading.problems:  # it stays, whatever is replaced
                break
            reading.problems.append(problem)
            match = re.match(r"([A-Za-z_]\w*)", problem)
            if match is None or match[1] not in repaired:
                break
            if (key := match[1]) in _NEUTRAL:
                repaired[key] = _NEUTRAL[key]
            else:  # transformers has a default, which need not be this model's
                del repaired[key]
                are_shapes_known = False
            (folder / "config.json").write_text(json.dumps(repaired))
            try:
                hf_config = read_config(folder, implementation)
            except ValueError as error:
                problem = _without_folder(error, folder)
                continue
            reading.hf_config = hf_config if are_shapes_known else None
            return
    if reading.values.get("model_type") not in supported_model_types():
        if foreign := list(_foreign_parts(reading)):
            reading.problems += foreign
        else:
            reading.remarks.append(
                "apart from the model_type nothing in config.json is known to be missing here: a "
                "family that reads it may be all it takes (CONTRIBUTING.md, Add a model family)"
            )


def _foreign_parts(reading: ConfigReading) -> Iterator[str]:
    """Yield what else a model without a family here has that none of the families has."""
    values = reading.text_values
    found: dict[str, list[str]] = {}  # what it is -> fields
    for given in {id(each): each for each in (reading.values, values)}.values():
        for key, what in _FOREIGN.items():
            if given.get(key) and key not in found.get(what, ()):
                found.setdefault(what, []).append(key)
    yield from (f"{', '.join(keys)} in config.json: {what}" for what, keys in found.items())
    if not any(_has_experts(each) for each in (values, values.get("ffn_config"))):
        yield "config.json has no number of experts: only mixture-of-experts models run"
    act = values.get("hidden_act", values.get("hidden_activation", values.get("mlp_hidden_act")))
    if act is not None and str(act) not in _ACTIVATIONS:
        yield f"hidden_act in config.json: the activation {act!r}"
    scheme = reading.values.get("quantization_config", values.get("quantization_config"))
    try:
        check_config(SimpleNamespace(hidden_act="silu", quantization_config=scheme))
    except ValueError as error:
        yield str(error)
    is_delta = bool(values.get("linear_num_key_heads"))  # the gated DeltaNet of Qwen3-Next
    for key, known in (
        ("layer_types", _ATTENTION | ({"linear_attention"} if is_delta else set())),
        ("mlp_layer_types", _MLPS),
    ):
        kinds = values.get(key)
        others = {str(kind) for kind in kinds} - known if isinstance(kinds, list) else None
        if others:
            yield f"{key} in config.json: layers of the kinds {', '.join(sorted(others))}"
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    if isinstance(rope, dict):
        kind = rope.get("rope_type") or rope.get("type")
        if any(isinstance(each, dict) for each in rope.values()):
            yield "rope_parameters in config.json: more than one rotary embedding"
        elif kind is not None and str(kind) not in _ROPE_TYPES:
            yield f"rope_scaling in config.json: rotary scaling of the type {kind!r}"
    score = values.get("scoring_func")
    if score is not None and str(score) not in _SCORES:
        yield f"scoring_func in config.json: scores of the kind {score!r}"


def _has_experts(values: Any) -> bool:
    """Return whether a part of config.json says how many experts there are."""
    return isinstance(values, Mapping) and any(values.get(key) for key in _NUM_EXPERTS)
