"""Report: reads a checkpoint's configuration and headers and prints what this engine makes of them.

Exit code 0: it runs; 1: it does not, and the report says what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from engine.config.tokenizer_files import FILES, check_tokenizer_files
from engine.generation.builder import model_dtype
from engine.model_check.capacity_rules import capacity_of
from engine.model_check.config_reading import ConfigReading, read_checkpoint_config
from engine.model_check.rank_share import RankShare, build_on_meta, part_bytes, share_of_rank
from engine.model_check.shapes import describe_shapes
from engine.model_check.stored_tensors import StoredTensors, compare, read_stored
from engine.model_check.text import lines_of
from engine.models.decoder import CausalLM
from engine.models.spec import ModelSpec, SparseSpec

GPU_GIB = (79.0, 139.0)  # what the driver leaves of 80 and 141 GB


@dataclass(frozen=True, slots=True)
class _Weights:
    """What follows from the model and the headers."""

    shares: list[RankShare]
    total: int  # parameters
    active: int  # of them per token


def run(
    folder: Path,
    ranks: Sequence[int],
    tensor: int = 1,
    dtype: str = "auto",
    gpu_gib: Sequence[float] | None = None,
    as_json: bool = False,
) -> int:
    """Print the report; return the exit code.

    Args:
        ranks: numbers of expert-parallel ranks.
        tensor: parallel.tensor.
        dtype: model.dtype.
        gpu_gib: sizes of GPUs; None: `GPU_GIB`.
        as_json: one JSON object instead of text.

    Raises:
        ValueError: the folder holds no config.json that can be read.
    """
    report = check(folder, ranks, tensor, dtype, gpu_gib or GPU_GIB)
    print(json.dumps(report) if as_json else "\n".join(lines_of(report)))
    return 0 if report["runs"] else 1


def check(
    folder: Path, ranks: Sequence[int], tensor: int, dtype: str, gpu_gib: Sequence[float]
) -> dict[str, Any]:
    """Return the report as what JSON can hold. Takes and raises what `run` does."""
    reading = read_checkpoint_config(folder)
    stored = read_stored(folder)
    report: dict[str, Any] = {
        "folder": str(folder),
        "model_type": reading.values.get("model_type"),
        "runs": False,
        "problems": reading.problems,
        "remarks": [],
    }
    model, own = None, torch.bfloat16
    if reading.hf_config is not None:
        own = model_dtype(dtype, reading.hf_config, torch.device("cuda"))
        try:
            model = build_on_meta(reading.hf_config, own)
        except ValueError as error:
            reading.problems.append(str(error))
    if model is None:
        compare(stored, folder, None, (), is_quantised=True)
    else:
        spec = model.spec
        weights = _weigh(model, reading, stored, folder, ranks, tensor, gpu_gib)
        report |= describe_shapes(spec, reading.hf_config)
        report["dtype"] = str(own).removeprefix("torch.")
        report["parameters"] = {"total": weights.total, "active": weights.active}
        report["ranks"] = [share.as_json() for share in weights.shares]
        report["capacity"] = _capacity(spec, weights.shares)
        if all(share.problem for share in weights.shares):
            report["problems"] += dict.fromkeys(share.problem for share in weights.shares)
    report["stored"] = stored.as_json()
    report["quantization"] = _scheme(reading)
    report["tokenizer"] = _tokenizer(folder, report["remarks"], report["problems"])
    report["problems"] += stored.problems
    report["runs"] = not report["problems"]
    return report


def _weigh(
    model: CausalLM,
    reading: ConfigReading,
    stored: StoredTensors,
    folder: Path,
    ranks: Sequence[int],
    tensor: int,
    gpu_gib: Sequence[float],
) -> _Weights:
    """Compare the files with the model, and return what ranks hold of it."""
    names = stored.catalog.entries.keys()
    slots = list(model.weight_slots(names))
    is_refused = any(each.startswith("quantization_config") for each in reading.problems)
    compare(stored, folder, slots, model.ignored_weights(names), is_refused)
    whole = part_bytes(model, names)
    total = sum(slot.target.numel() for slot in slots if slot.tied_to is None)
    idle = Fraction(0)
    for layer in model.moe_layers:
        moe, router = layer.spec, layer.spec.router
        # Of a mean token: zero experts take their share of its choices.
        chosen = Fraction(router.top_k * router.num_experts, router.num_logits)
        idle += (router.num_experts - chosen) * (moe.experts.parts + 1) * moe.width * moe.ffn
    shares = [
        share_of_rank(
            reading.hf_config,
            model.dtype,
            number,
            tensor,
            names=names,
            stored=stored.part_bytes(),
            whole=whole,
            gpu_gib=gpu_gib,
        )
        for number in ranks
    ]
    return _Weights(shares, total, total - int(idle))


def _capacity(spec: ModelSpec, shares: Sequence[RankShare]) -> dict[str, Any] | None:
    """Return what capacity can do on the largest number of ranks that the model runs on."""
    sparse = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, SparseSpec)]
    fitting = [share.ranks for share in shares if not share.problem]
    if not sparse or not fitting:
        return None
    # Of layers with unequal top-k the one that needs the largest factor to drop nothing.
    fewest = min(sparse, key=lambda mlp: mlp.moe.router.top_k)
    return capacity_of(fewest, max(fitting))


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
