"""Quantization: what model.quantization means for a checkpoint on a device.

| setting    | experts are held                                    | other weights    |
|------------|-----------------------------------------------------|------------------|
| dequantize | in model.dtype                                      | in model.dtype   |
| int8, int4 | as integers made from their values                  | in model.dtype   |
| fp8        | in E4M3 made from their values, a scale per 128x128 | in model.dtype   |
|            | (with `scaled_mm` per output)                       |                  |
| keep       | as the checkpoint stores them: integers, FP8, MXFP4 | in model.dtype   |
| auto       | keep where a compiled kernel computes on them and   | in model.dtype   |
|            | they fit, else dequantize                           |                  |

The backend `scaled_mm` takes FP8 with a scale per output alone, made or stored, `deep_gemm` in
blocks of 128 x 128. `auto` takes `deep_gemm` for such blocks where it runs: the only choice that
rounds activations.

Kernels compute on all of them on CUDA, on the CPU on integers of plain SwiGLU experts. Elsewhere
one expert at a time is dequantised in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import torch

from engine.config import Config
from engine.models.expert_tensors import expert_tensors
from engine.models.expert_weights import expert_names
from engine.models.spec import ModelSpec, SparseSpec
from engine.moe.backend_choice import choose_backend, deep_gemm_serves
from engine.moe.low_bit_experts import FP8_BLOCK, ExpertLayouts
from engine.moe.placement.placement import COPY_GROUP
from engine.moe.spec import MoESpec
from engine.ops import native, triton_support
from engine.ops.quantised_rows import FloatLayout, IntegerLayout, Layout
from engine.weights.formats.grouping import read_weights
from engine.weights.formats.kept import NotKept, kept_layouts
from engine.weights.formats.scheme import Scheme, scheme_of

_MADE = {
    "int8": ExpertLayouts.of_bits(8, COPY_GROUP),
    "int4": ExpertLayouts.of_bits(4, COPY_GROUP),
    "fp8": ExpertLayouts.of_fp8(),
}
_OTHERS = "set model.quantization to auto, dequantize, int8, int4 or fp8"
# Backends that multiply FP8 with FP8: what is made for them, and the scales of what is stored.
_FP8_PRODUCTS = {
    "scaled_mm": (ExpertLayouts.of_fp8_rows(), "per output or matrix"),
    "deep_gemm": (ExpertLayouts.of_fp8_blocks(), "per block of 128x128"),
}


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
    if backend in _FP8_PRODUCTS:
        return _for_fp8_product(backend, config, spec, device, dtype)
    if setting not in ("auto", "dequantize") and backend not in ("auto", "torch"):
        raise ValueError(
            f"moe.experts.backend: {backend!r} computes on weights in model.dtype, and "
            f"model.quantization = {setting} holds the experts in few bits; set "
            "moe.experts.backend to auto, or model.quantization to dequantize"
        )
    held = _held(config, spec, device, dtype)
    return _with_deep_gemm(held, spec, device, dtype) if backend == "auto" else held


def _held(config: Config, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Held:
    """Return `resolve_quantization` of backends with float activations: the same arguments."""
    setting, backend = config.model.quantization, config.moe.experts.backend
    folder = Path(config.model.path)
    scheme = None if config.model.load_format == "dummy" else scheme_of(folder)
    if setting in _MADE:
        return Held(setting, dict.fromkeys(expert_names(spec), _MADE[setting]))
    if scheme is None:
        return Held("none")
    may_keep = backend in ("auto", "torch") and _computes(spec, device, dtype)
    if setting == "keep" or (setting == "auto" and may_keep):
        try:
            found = _kept(config, spec, scheme)
        except NotKept as error:
            if setting == "keep":
                raise ValueError(f"model.quantization: 'keep': {error}; {_OTHERS}") from error
        else:
            are_integers = all(isinstance(each, IntegerLayout) for each in chain(*found.values()))
            if setting == "keep" or device.type != "cpu" or are_integers:
                kept = {layer: ExpertLayouts(*each, kept=True) for layer, each in found.items()}
                return Held("keep", kept)
    return Held("dequantize")


def _sparse(spec: ModelSpec) -> dict[int, MoESpec]:
    """Return the MoE layers by their index."""
    return {
        index: layer.mlp.moe
        for index, layer in enumerate(spec.layers)
        if isinstance(layer.mlp, SparseSpec)
    }


def _with_deep_gemm(held: Held, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Held:
    """Return experts in FP8 in blocks as `deep_gemm` takes them, where it runs; else as given."""
    layouts = [layout for each in held.layouts.values() for layout in (each.w13, each.w2)]
    if not layouts or any(_in_blocks(each) is None for each in layouts):
        return held
    widths = []
    for moe in _sparse(spec).values():
        if not moe.experts.is_plain:
            return held
        widths += [moe.width, moe.ffn]
    if not deep_gemm_serves(device, dtype, widths):
        return held
    block = FloatLayout("fp8", FP8_BLOCK, in_rows=True)
    return Held(
        held.name, {i: replace(each, w13=block, w2=block) for i, each in held.layouts.items()}
    )


def _for_fp8_product(
    name: str, config: Config, spec: ModelSpec, device: torch.device, dtype: torch.dtype
) -> Held:
    """Return how the experts are held for a product of FP8 with FP8: row by row.

    Args:
        name: the backend.
        config, spec, device, dtype: those of `resolve_quantization`.

    Raises:
        ValueError: the device, the setting, the experts or what the checkpoint stores do not fit.
    """
    where, setting = f"moe.experts.backend: {name!r}", config.model.quantization
    made, scales = _FP8_PRODUCTS[name]
    sparse = _sparse(spec)
    for moe in sparse.values():
        choose_backend(name, device, dtype, (moe.width, moe.ffn))
        if not moe.experts.is_plain:
            raise ValueError(
                f"{where} computes plain SwiGLU experts alone, and this model's have "
                f"{moe.experts.words}; choose 'auto'"
            )
    if setting == "fp8":
        return Held(setting, dict.fromkeys(sparse, made))
    if setting not in ("auto", "keep"):
        raise ValueError(
            f"{where} computes on experts in FP8, and model.quantization = {setting} holds them "
            "otherwise; set model.quantization to fp8, or moe.experts.backend to auto"
        )
    folder, others = Path(config.model.path), "set model.quantization to fp8, which rounds them so"
    scheme = None if config.model.load_format == "dummy" else scheme_of(folder)
    if scheme is None:
        raise ValueError(
            f"{where} computes on experts in FP8, and this checkpoint is not quantised; {others}"
        )
    try:
        found = _kept(config, spec, scheme)
    except NotKept as error:
        raise ValueError(f"{where} computes on experts in FP8: {error}; {others}") from error
    held = {}
    for index, moe in sparse.items():
        pairs = zip(found.get(index, ()), (moe.width, moe.ffn), strict=False)
        rows = [
            _in_blocks(layout) if name == "deep_gemm" else _in_rows(layout, width)
            for layout, width in pairs
        ]
        if len(rows) != 2 or rows[0] is None or rows[1] is None:
            raise ValueError(
                f"{where} computes on experts in FP8 with a scale {scales}, and those "
                f"of layer {index} are stored otherwise ({scheme.name}); {others}"
            )
        held[index] = ExpertLayouts(rows[0], rows[1], kept=True)
    return Held("keep", held)


def _kept(config: Config, spec: ModelSpec, scheme: Scheme) -> dict[int, tuple[Layout, Layout]]:
    """Return how the experts' matrices are held as the checkpoint stores them, by layer.

    Raises:
        NotKept: they cannot be.
    """
    folder, entries = Path(config.model.path), read_weights(Path(config.model.path)).entries
    names = expert_tensors(folder, spec, entries.keys(), config.model.implementation)
    return kept_layouts(entries, names, scheme)


def _in_rows(layout: Layout, width: int) -> FloatLayout | None:
    """Return the layout of a matrix row by row, None where a row has no single FP8 scale."""
    if not isinstance(layout, FloatLayout) or layout.format != "fp8" or layout.block[1] < width:
        return None
    return FloatLayout("fp8", (1, width), in_rows=True)


def _in_blocks(layout: Layout) -> FloatLayout | None:
    """Return the layout of a matrix in blocks row by row, None where it has other scales."""
    if not isinstance(layout, FloatLayout) or layout.format != "fp8" or layout.block != FP8_BLOCK:
        return None
    return FloatLayout("fp8", FP8_BLOCK, in_rows=True)


def _computes(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a compiled kernel computes on experts in few bits, on the CPU on integers."""
    if device.type != "cpu":
        return triton_support.serves_on(device)
    forms = [layer.mlp.moe.experts for layer in spec.layers if isinstance(layer.mlp, SparseSpec)]
    is_plain = all(form.is_plain for form in forms)
    return native.available() and dtype == torch.float32 and is_plain
