"""Scheme: what config.json says of a checkpoint's quantisation, and what model.quantization asks.

Layers that config.json excludes (`modules_to_not_convert`, `ignore`) are not looked up: a weight
without scales is read as it is, so the files decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config.checkpoint_files import is_there, read_json_object

SUPPORTED = (
    "FP8 E4M3 with scales per tensor, row or block (quant_method fp8, compressed-tensors, "
    "modelopt), MXFP4 (mxfp4), int4 and int8 in groups (compressed-tensors pack-quantized), "
    "int4 of AWQ (gemm) and GPTQ"
)
_FIELDS = ("quantization_config", "compression_config")
MODELOPT = "hf_quant_config.json"  # of modelopt's older exports
_REMEDY = "use such a checkpoint, or one in bfloat16"


class UnsupportedScheme(ValueError):
    """A quantisation that is not read; the text names it and what is supported."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint is quantised."""

    name: str  # as reports show it, such as fp8 or compressed-tensors
    block: tuple[int, int] | None = None  # of FP8: rows and columns per scale
    bits: int = 4  # of packed integers
    group_size: int | None = None  # inputs per scale of integers; None: all
    zero_offset: int = 0  # 1: to be added to stored zero points
    act_order: bool = False  # whether inputs are in groups by their activations


def quantization_of(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantisation in the values of a config.json, None where there is none.

    Raises:
        ValueError: it is no mapping.
    """
    text = values.get("text_config")
    for each in (values, text if isinstance(text, Mapping) else {}):
        for field in _FIELDS:
            if (found := each.get(field)) is not None:
                if not isinstance(found, Mapping):
                    raise ValueError(
                        f"{field}: {found!r} in config.json must be a mapping; use the config.json "
                        "that the checkpoint was published with"
                    )
                return found
    return None


def scheme_of(folder: Path) -> Scheme | None:
    """Return how the checkpoint in a folder is quantised, None where nothing says that it is.

    Raises:
        ValueError: the scheme is not supported, or the files that say it cannot be read.
    """
    found = None
    if is_there(folder / "config.json"):
        found = quantization_of(read_json_object(folder / "config.json"))
    if found is None and is_there(folder / MODELOPT):
        found = read_json_object(folder / MODELOPT).get("quantization")
        found = {**found, "quant_method": "modelopt"} if isinstance(found, Mapping) else None
    return None if found is None else read_scheme(found)


def read_scheme(values: Mapping[str, Any]) -> Scheme:
    """Return what a `quantization_config` means.

    Raises:
        UnsupportedScheme: naming the scheme and what is supported.
    """
    method = values.get("quant_method")
    if method is None and "config_groups" in values:
        method = "compressed-tensors"
    readers = {
        "fp8": _fp8,
        "mxfp4": lambda values: Scheme("mxfp4"),
        "compressed-tensors": _compressed_tensors,
        "modelopt": _modelopt,
        "awq": _awq,
        "gptq": _gptq,
    }
    if not isinstance(method, str) or method not in readers:
        raise _unsupported(f"quant_method = {method!r}")
    return readers[method](values)


def _unsupported(what: str) -> UnsupportedScheme:
    return UnsupportedScheme(
        f"quantization_config in config.json: {what} is not supported; supported are {SUPPORTED}; "
        f"{_REMEDY}"
    )


def _block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 2
        or not all(type(size) is int and size > 0 for size in value)
    ):
        raise _unsupported(f"a block of {value!r} (two sizes are needed, such as [128, 128])")
    return value[0], value[1]


def _group_size(values: Mapping[str, Any]) -> int | None:
    size = values.get("group_size")
    if size in (None, -1):
        return None
    if type(size) is not int or size <= 0:
        raise _unsupported(f"group_size = {size!r}")
    return size


def _fp8(values: Mapping[str, Any]) -> Scheme:
    kind = str(values.get("fmt", "e4m3")).lower()
    if kind not in ("e4m3", "float8_e4m3fn"):
        raise _unsupported(f"fp8 with fmt = {values.get('fmt')!r}")
    return Scheme("fp8", block=_block(values.get("weight_block_size")))


def _compressed_tensors(values: Mapping[str, Any]) -> Scheme:
    groups = values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _unsupported("compressed-tensors without config_groups")
    block, bits, group_size = None, 4, None
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if weights is None:  # of activations alone
            continue
        kind, num_bits = weights.get("type"), weights.get("num_bits")
        strategy = weights.get("strategy")
        what = group.get("format") or values.get("format")
        shown = f"compressed-tensors {what} ({name}: {kind}{num_bits} per {strategy})"
        if kind == "float" and num_bits == 8 and what in (None, "float-quantized"):
            if strategy not in (None, "tensor", "channel", "block"):
                raise _unsupported(shown)
            block = _block(weights.get("block_structure")) or block
        elif kind == "int" and num_bits in (4, 8) and what == "pack-quantized":
            if strategy not in ("channel", "group"):
                raise _unsupported(shown)
            bits = num_bits
            group_size = _group_size(weights) if strategy == "group" else group_size
        else:
            raise _unsupported(shown)
    return Scheme("compressed-tensors", block, bits, group_size)


def _modelopt(values: Mapping[str, Any]) -> Scheme:
    algorithm = values.get("quant_algo")
    if algorithm not in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        raise _unsupported(f"modelopt with quant_algo = {algorithm!r}")
    return Scheme("modelopt")


def _awq(values: Mapping[str, Any]) -> Scheme:
    version = str(values.get("version") or values.get("format") or "gemm").lower()
    bits = values.get("bits", values.get("w_bit", 4))
    if bits != 4 or version != "gemm" or values.get("zero_point", True) is not True:
        raise _unsupported(
            f"awq with bits = {bits!r}, version = {version!r}, zero_point = "
            f"{values.get('zero_point', True)!r} (only 4, gemm, true)"
        )
    return Scheme("awq", group_size=_group_size(values))


def _gptq(values: Mapping[str, Any]) -> Scheme:
    stored = values.get("checkpoint_format", values.get("format")) or "gptq"
    if values.get("bits") != 4 or stored not in ("gptq", "gptq_v2"):
        raise _unsupported(
            f"gptq with bits = {values.get('bits')!r}, checkpoint_format = {stored!r} (only 4, "
            "gptq or gptq_v2)"
        )
    return Scheme(
        "gptq",
        group_size=_group_size(values),
        zero_offset=stored == "gptq",
        act_order=bool(values.get("desc_act")),
    )
