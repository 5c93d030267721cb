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
from engine.models.registry import read_config, supported_model_types

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
    "attention_chunk_size": "attention in chunks",
    "linear_num_key_heads": "linear attention (gated DeltaNet), a recurrent state per sequence",
    "linear_attn_config": "linear attention, a recurrent state per sequence",
    "mamba_num_heads": "Mamba layers, a recurrent state per sequence",
    "mamba_n_heads": "Mamba layers, a recurrent state per sequence",
    "mamba_d_state": "Mamba layers, a recurrent state per sequence",
    "attn_logit_softcapping": "a soft cap on the attention's logits",
    "final_logit_softcapping": "a soft cap on the model's logits",
    "moe_latent_size": "experts in a latent width",
    "zero_expert_num": "experts that compute nothing",
    "num_hash_layers": "routing by a table of token ids",
    "hc_mult": "several residual streams (hyper-connections)",
}
_FULL_ATTENTION = "full_attention"


@dataclass(slots=True)
class ConfigReading:
    """What config.json says."""

    values: dict[str, Any]  # of the file
    problems: list[str] = field(default_factory=list)  # why it does not run
    # The transformers configuration, the fields that are refused replaced; None: it has no family,
    # or too much is wrong to know the shapes.
    hf_config: Any = None

    @property
    def text_values(self) -> Mapping[str, Any]:
        """The fields of the language model."""
        inner = self.values.get("text_config")
        return inner if isinstance(inner, dict) else self.values


def read_checkpoint_config(folder: Path) -> ConfigReading:
    """Return what the config.json of a folder says, and all that is wrong with it.

    Raises:
        ValueError: there is no such folder, or no config.json that can be read.
    """
    if not folder.is_dir():
        raise ValueError(
            f"DIR = {str(folder)!r}: no such folder; name one with config.json and safetensors"
        )
    if not is_there(folder / "config.json"):
        raise ValueError(f"DIR = {str(folder)!r}: holds no config.json; name a checkpoint's folder")
    reading = ConfigReading(read_json_object(folder / "config.json"))
    try:
        reading.hf_config = read_config(folder)
    except ValueError as error:
        _collect(reading, _without_folder(error, folder))
    return reading


def _without_folder(error: ValueError, folder: Path) -> str:
    return str(error).removeprefix(f"model.path = {str(folder)!r}: ")


def _collect(reading: ConfigReading, first: str) -> None:
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
                hf_config = read_config(folder)
            except ValueError as error:
                problem = _without_folder(error, folder)
                continue
            reading.hf_config = hf_config if are_shapes_known else None
            return
    if reading.values.get("model_type") not in supported_model_types():
        reading.problems += _foreign_parts(reading)


def _foreign_parts(reading: ConfigReading) -> Iterator[str]:
    """Yield what else a model without a family here has that none of the families has."""
    values = reading.text_values
    for given in {id(each): each for each in (reading.values, values)}.values():
        for key, what in _FOREIGN.items():
            if given.get(key):
                yield f"{key} in config.json: {what}"
    act = values.get("hidden_act", values.get("hidden_activation", values.get("mlp_hidden_act")))
    scheme = reading.values.get("quantization_config", values.get("quantization_config"))
    for asked in ({"hidden_act": act or "silu"}, {"quantization_config": scheme}):
        try:
            check_config(SimpleNamespace(**{"hidden_act": "silu", **asked}))
        except ValueError as error:
            yield str(error)
    kinds = values.get("layer_types")
    if isinstance(kinds, list):
        others = sorted({str(kind) for kind in kinds} - {_FULL_ATTENTION})
        if others:
            yield f"layer_types in config.json: attention of the kinds {', '.join(others)}"
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    if isinstance(rope, dict):
        kind = rope.get("rope_type") or rope.get("type")
        if any(isinstance(each, dict) for each in rope.values()):
            yield "rope_parameters in config.json: more than one rotary embedding"
        elif kind is not None and str(kind) not in _ROPE_TYPES:
            yield f"rope_scaling in config.json: rotary scaling of the type {kind!r}"
    if values.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        yield (
            f"partial_rotary_factor = {values['partial_rotary_factor']} in config.json: heads that "
            "are rotated in part"
        )
    if values.get("scoring_func", "softmax") not in (None, "softmax", "sigmoid"):
        yield f"scoring_func in config.json: scores of the kind {values['scoring_func']!r}"
    for key in ("num_experts_per_tok", "moe_topk"):
        if isinstance(values.get(key), list):
            yield f"{key} in config.json: another top-k in each layer"
