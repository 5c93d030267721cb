"""Quantization: what model.quantization means for a checkpoint on a device.

| setting    | experts are held                                    | other weights    |
|------------|-----------------------------------------------------|------------------|
| dequantize | in model.dtype                                      | in model.dtype   |
| int8, int4 | as integers made from their values                  | in model.dtype   |
| fp8        | in E4M3 made from their values, a scale per 128x128 | in model.dtype   |
| keep       | as the checkpoint stores them: integers, FP8, MXFP4 | in model.dtype   |
| auto       | keep where a compiled kernel computes on them and   | in model.dtype   |
|            | they fit, else dequantize                           |                  |

Kernels compute on all of them on CUDA, on the CPU on integers of plain SwiGLU experts. Elsewhere
one expert at a time is dequantised in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch

from engine.config import Config
from engine.models.expert_weights import expert_names
from engine.models.spec import ModelSpec, SparseSpec
from engine.moe.low_bit_experts import ExpertLayouts
from engine.moe.placement.placement import COPY_GROUP
from engine.ops import native, triton_support
from engine.ops.quantised_rows import IntegerLayout
from engine.weights.formats.grouping import read_weights
from engine.weights.formats.kept import NotKept, kept_layouts
from engine.weights.formats.scheme import scheme_of

_MADE = {
    "int8": ExpertLayouts.of_bits(8, COPY_GROUP),
    "int4": ExpertLayouts.of_bits(4, COPY_GROUP),
    "fp8": ExpertLayouts.of_fp8(),
}
_OTHERS = "set model.quantization to auto, dequantize, int8, int4 or fp8"


@dataclass(frozen=True, slots=True)
class Held:
    """How weights are held."""

    name: str  # none, dequantize, keep, int8, int4 or fp8; none: the checkpoint is not quantised
    layouts: Mapping[int, ExpertLayouts] = field(default_factory=dict)  # by layer, of experts in
    # few bits


def resolve_quantization(
    config: Config, spec: ModelSpec, device: torch.device, dtype: torch.dtype
) -> Held:
    """Return how the weights of a model are held.

    Reads the headers of the checkpoint where what it stores may be kept.

    Args:
        config: of the run.
        spec: of the model.
        device: of the weights.
        dtype: of hidden states.

    Raises:
        ValueError: the setting asks for what no backend computes, or contradicts another.
    """
    setting, backend = config.model.quantization, config.moe.experts.backend
    if setting not in ("auto", "dequantize") and backend not in ("auto", "torch"):
        raise ValueError(
            f"moe.experts.backend: {backend!r} computes on weights in model.dtype, and "
            f"model.quantization = {setting} holds the experts in few bits; set "
            "moe.experts.backend to auto, or model.quantization to dequantize"
        )
    folder = Path(config.model.path)
    scheme = None if config.model.load_format == "dummy" else scheme_of(folder)
    if setting in _MADE:
        return Held(setting, dict.fromkeys(expert_names(spec), _MADE[setting]))
    if scheme is None:
        return Held("none")
    may_keep = backend in ("auto", "torch") and _computes(spec, device, dtype)
    if setting == "keep" or (setting == "auto" and may_keep):
        try:
            found = kept_layouts(read_weights(folder).entries, expert_names(spec), scheme)
        except NotKept as error:
            if setting == "keep":
                raise ValueError(f"model.quantization: 'keep': {error}; {_OTHERS}") from error
        else:
            are_integers = all(isinstance(each, IntegerLayout) for each in chain(*found.values()))
            if setting == "keep" or device.type != "cpu" or are_integers:
                kept = {layer: ExpertLayouts(*each, kept=True) for layer, each in found.items()}
                return Held("keep", kept)
    return Held("dequantize")


def _computes(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a compiled kernel computes on experts in few bits, on the CPU on integers."""
    if device.type != "cpu":
        return triton_support.serves_on(device)
    forms = [layer.mlp.moe.experts for layer in spec.layers if isinstance(layer.mlp, SparseSpec)]
    is_plain = all(form.is_plain for form in forms)
    return native.available() and dtype == torch.float32 and is_plain
