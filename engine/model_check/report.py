"""Report: reads a checkpoint's configuration and headers and prints what this engine makes of them.

Exit code 0: it runs; 1: it does not, and the report says what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from engine.config import Config, ModelConfig
from engine.config.tokenizer_files import FILES, check_tokenizer_files
from engine.generation.quantization import Held, resolve_quantization
from engine.layers.precision import compute_dtype
from engine.model_check.capacity_rules import capacity_of
from engine.model_check.config_reading import ConfigReading, read_checkpoint_config
from engine.model_check.parameters import count_parameters
from engine.model_check.rank_share import Setup, shares_of_ranks
from engine.model_check.shapes import describe_shapes
from engine.model_check.stored_tensors import (
    StoredTensors,
    compare,
    group_weights,
    part_finder,
    read_stored,
)
from engine.model_check.text import lines_of
from engine.models.model_types import Implementation
from engine.models.registry import unread_parts
from engine.models.spec import ModelSpec
from engine.models.transformers_model.model import TransformersModel
from engine.models.weight_dtype import model_dtype

GPU_GIB = (79.0, 139.0)  # what the driver leaves of 80 and 141 GB
_CUDA = torch.device("cuda")
_NO_DTYPE = (
    "config.json names no torch_dtype, so model.dtype = auto is float32 on CUDA; set bfloat16 "
    "(here --dtype bfloat16) to take half the bytes"
)


def run(
    folder: Path,
    ranks: Sequence[int],
    tensor: int = 1,
    dtype: str = "auto",
    gpu_gib: Sequence[float] | None = None,
    as_json: bool = False,
    quantization: str = "auto",
    implementation: Implementation = "auto",
) -> int:
    """Print the report; return the exit code.

    Args:
        ranks: numbers of expert-parallel ranks.
        tensor: parallel.tensor.
        dtype: model.dtype.
        gpu_gib: sizes of GPUs; None: `GPU_GIB`.
        as_json: one JSON object instead of text.
        quantization: model.quantization.
        implementation: model.implementation.

    Raises:
        ValueError: the folder holds no config.json that can be read.
    """
    report = check(folder, ranks, tensor, dtype, gpu_gib or GPU_GIB, quantization, implementation)
    print(json.dumps(report) if as_json else "\n".join(lines_of(report)))
    return 0 if report["runs"] else 1


def check(
    folder: Path,
    ranks: Sequence[int],
    tensor: int,
    dtype: str,
    gpu_gib: Sequence[float],
    quantization: str = "auto",
    implementation: Implementation = "auto",
) -> dict[str, Any]:
    """Return the report as what JSON can hold. Takes and raises what `run` does."""
    reading = read_checkpoint_config(folder, implementation)
    stored = read_stored(folder)
    report: dict[str, Any] = {
        "folder": str(folder),
        "model_type": reading.values.get("model_type"),
        "runs": False,
        "problems": reading.problems,
        "remarks": reading.remarks,
    }
    model, own = None, torch.bfloat16
    if reading.hf_config is not None:
        if unread := unread_parts(folder):
            report["remarks"].append(unread)
        own = model_dtype(dtype, reading.hf_config, _CUDA)
        try:
            model = Setup(reading.hf_config, own, implementation=implementation).build()
        except ValueError as error:
            reading.problems.append(str(error))
    if model is None:
        compare(stored, folder, None, (), is_quantised=True)
    else:
        is_refused = _is_format_refused(reading)
        if not is_refused:
            group_weights(stored, folder)
        names = (stored.weights or stored.catalog).entries.keys()
        slots = list(model.weight_slots(names))
        if dtype == "auto" and getattr(reading.hf_config, "dtype", None) is None:
            report["remarks"].append(_NO_DTYPE)
        part_of = part_finder(model, names)
        compare(stored, folder, slots, model.ignored_weights(names), is_refused, part_of)
        held = None
        if not is_refused:
            held = _held(quantization, reading, stored, folder, model.spec, own)
        layouts = held and held.layouts
        setup = Setup(reading.hf_config, own, tensor, layouts, names, implementation)
        shares = shares_of_ranks(setup, model, ranks, stored.part_bytes(), gpu_gib)
        report |= describe_shapes(model, reading.hf_config)
        report["implementation"] = {
            "setting": implementation,
            "as": "transformers" if isinstance(model, TransformersModel) else "lockstep",
        }
        report["dtype"] = str(own).removeprefix("torch.")
        report["held"] = {"setting": quantization, "as": held and held.name}
        report["parameters"] = asdict(count_parameters(model, slots, part_of))
        report["ranks"] = [share.as_json() for share in shares]
        fitting = [share.ranks for share in shares if not share.problem]
        report["capacity"] = capacity_of(model.spec, max(fitting)) if fitting else None
        if all(share.problem for share in shares):
            report["problems"] += dict.fromkeys(share.problem for share in shares)
    report["stored"] = stored.as_json()
    report["quantization"] = _scheme(reading)
    report["tokenizer"] = _tokenizer(folder, report["remarks"], report["problems"])
    report["problems"] += stored.problems
    report["runs"] = not report["problems"]
    return report


def _is_format_refused(reading: ConfigReading) -> bool:
    return any(each.startswith("quantization_config") for each in reading.problems)


def _held(
    setting: str,
    reading: ConfigReading,
    stored: StoredTensors,
    folder: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
) -> Held | None:
    """Return how the weights are held on CUDA; None where that is refused, which is a problem."""
    # The headers of files with problems of their own, which are told, say nothing more.
    model = ModelConfig(
        path=str(folder),
        quantization=cast(Any, setting),
        load_format="dummy" if stored.problems else "safetensors",
    )
    try:
        return resolve_quantization(Config(model=model), spec, _CUDA, compute_dtype(dtype, _CUDA))
    except ValueError as error:
        reading.problems.append(str(error))
        return None


def _scheme(reading: ConfigReading) -> str | None:
    """Return the name of the checkpoint's quantisation, None without one."""
    given = reading.values.get("quantization_config")
    given = given or reading.text_values.get("quantization_config")
    if not isinstance(given, dict):
        return None
    parts = [str(given.get("quant_method", "unnamed"))]
    for key in ("fmt", "format", "bits", "group_size", "weight_block_size", "scale_fmt"):
        if given.get(key) is not None:
            parts.append(f"{key} {given[key]}")
    return ", ".join(parts)


def _tokenizer(folder: Path, remarks: list[str], problems: list[str]) -> dict[str, Any]:
    """Return which tokenizer and chat template are there; add what is wrong with them."""
    found = [name for name in FILES if (folder / name).is_file()]
    try:
        check_tokenizer_files(folder)
    except ValueError as error:
        problems.append(str(error))
    if not found:
        remarks.append("no tokenizer: prompts must be token ids, or name one by model.tokenizer")
    return {"files": found, "chat_template": _has_template(folder)}


def _has_template(folder: Path) -> bool:
    names = ("chat_template.jinja", "chat_template.json")
    if any((folder / name).is_file() for name in names):
        return True
    try:
        values = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and bool(values.get("chat_template"))
