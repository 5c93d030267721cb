"""Quantization: what model.quantization means for a checkpoint on a device.

| setting    | experts are held                                  | other weights    |
|------------|---------------------------------------------------|------------------|
| dequantize | in model.dtype                                    | in model.dtype   |
| int8, int4 | as integers made from their values                | in model.dtype   |
| keep       | as the checkpoint's integers, where it has such   | in model.dtype   |
| auto       | keep where a compiled kernel computes on them and | in model.dtype   |
|            | they fit, else dequantize                         |                  |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.config import Config
from engine.models.expert_weights import expert_names
from engine.models.spec import ModelSpec, SparseSpec
from engine.moe.low_bit_experts import ExpertLayouts
from engine.moe.placement.placement import COPY_GROUP
from engine.ops import native
from engine.weights.formats.grouping import read_weights
from engine.weights.formats.kept import NotKept, kept_layouts
from engine.weights.formats.scheme import scheme_of

_BITS = {"int8": 8, "int4": 4}
_OTHERS = "set model.quantization to auto, dequantize, int8 or int4"


@dataclass(frozen=True, slots=True)
class Held:
    """How weights are held."""

    name: str  # none, dequantize, keep, int8 or int4; none: the checkpoint is not quantised
    layouts: Mapping[int, ExpertLayouts] = field(default_factory=dict)  # by layer, of experts that
    # are integers


def resolve_quantization(
    config: Config, spec: ModelSpec, device: torch.device, dtype: torch.dtype
) -> Held:
    """Return how the weights of a model are held.

    Reads the headers of the checkpoint where its own integers may be kept.

    Args:
        config: of the run.
        spec: of the model.
        device: of the weights.
        dtype: of hidden states.

    Raises:
        ValueError: the setting asks for what no backend computes, or contradicts another.
    """
    setting, backend = config.model.quantization, config.moe.experts.backend
    if setting == "fp8":
        raise ValueError(
            "model.quantization: 'fp8': needs an experts backend that computes on FP8, and there "
            f"is none yet; {_OTHERS}"
        )
    if setting in ("int8", "int4", "keep") and backend not in ("auto", "torch"):
        raise ValueError(
            f"moe.experts.backend: {backend!r} computes on weights in model.dtype, and "
            f"model.quantization = {setting} holds the experts as integers; set "
            "moe.experts.backend to auto, or model.quantization to dequantize"
        )
    forms = [layer.mlp.moe.experts for layer in spec.layers if isinstance(layer.mlp, SparseSpec)]
    is_plain = all(form.is_plain for form in forms)
    if setting in ("int8", "int4", "keep") and not is_plain:
        words = next(form.words for form in forms if not form.is_plain)
        raise ValueError(
            f"model.quantization: {setting!r}: integers run plain SwiGLU experts alone, and this "
            f"model's have {words}; set model.quantization to auto or dequantize"
        )
    folder = Path(config.model.path)
    scheme = None if config.model.load_format == "dummy" else scheme_of(folder)
    if setting in _BITS:
        layouts = ExpertLayouts.of_bits(_BITS[setting], COPY_GROUP)
        return Held(setting, dict.fromkeys(expert_names(spec), layouts))
    if scheme is None:
        return Held("none")
    computes = device.type == "cpu" and native.available() and dtype == torch.float32 and is_plain
    if setting == "keep" or (setting == "auto" and computes and backend in ("auto", "torch")):
        try:
            found = kept_layouts(read_weights(folder).entries, expert_names(spec), scheme)
        except NotKept as error:
            if setting == "keep":
                raise ValueError(f"model.quantization: 'keep': {error}; {_OTHERS}") from error
        else:
            kept = {layer: ExpertLayouts(*each, kept=True) for layer, each in found.items()}
            return Held("keep", kept)
    return Held("dequantize")
