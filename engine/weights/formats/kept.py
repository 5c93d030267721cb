"""Kept weights: which weights of a quantised checkpoint can be held as they are stored.

The layouts that the experts' product reads have integers of 4 or 8 bits in groups of consecutive
inputs, a multiple of 8 or a whole row, with a scale and perhaps a zero point
(`engine/ops/quantised.py`), or FP8 and MXFP4 (`engine/ops/low_bit_floats.py`). All experts of a
layer share it, so their weights must agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.ops.quantised_rows import FloatLayout, IntegerLayout, Layout
from engine.weights.entry import FloatWeight, IntegerWeight, StoredWeight, TensorEntry
from engine.weights.formats.scheme import Scheme

KEPT = (
    "experts of int4 or int8 (compressed-tensors pack-quantized, AWQ, GPTQ) in groups of a "
    "multiple of 8 consecutive inputs, of FP8 in blocks of a multiple of 4 inputs and of MXFP4, "
    "alike in all experts of a layer"
)
Layers = Mapping[int, tuple[Sequence[str], Sequence[str]]]


class NotKept(ValueError):
    """Experts that cannot be held as a checkpoint stores them; the text says why."""


def kept_layouts(
    entries: Mapping[str, TensorEntry], layers: Layers, scheme: Scheme
) -> dict[int, tuple[Layout, Layout]]:
    """Return how the experts' matrices are held, of each layer whose experts are quantised.

    Args:
        entries: of the checkpoint's weights.
        layers: layer -> names that its experts' gate and up weights may have, and their down
            weights.
        scheme: of the checkpoint.

    Raises:
        NotKept: naming the scheme, a tensor and what is kept.
    """
    found = {}
    for layer, matrices in layers.items():
        # Tensors that are missing are reported when the checkpoint is compared with the model.
        names = [[name for name in each if name in entries] for each in matrices]
        stored = [name for each in names for name in each if entries[name].stored is not None]
        if not stored:
            continue
        layouts = [_shared_layout(entries, each, scheme) for each in names]
        if not all(names):
            raise NotKept(f"{scheme.name}: some experts of layer {layer} are missing")
        found[layer] = (layouts[0], layouts[1])
    if not found:
        raise NotKept(f"{scheme.name}: no expert is quantised; {KEPT} are kept")
    return found


def _shared_layout(
    entries: Mapping[str, TensorEntry], names: Sequence[str], scheme: Scheme
) -> Layout:
    layouts: dict[Layout, str] = {}
    for name in names:
        layouts.setdefault(_layout(entries[name].stored, name, scheme), name)
    if len(layouts) > 1:
        (one, first), (other, second) = list(layouts.items())[:2]
        raise NotKept(f"{scheme.name}: {first} has {_words(one)}, {second} {_words(other)}")
    return next(iter(layouts), IntegerLayout(4, 8))


def _layout(stored: StoredWeight | None, name: str, scheme: Scheme) -> Layout:
    if stored is None:
        raise NotKept(f"{scheme.name}: {name} is not quantised, other experts of its layer are")
    if isinstance(stored, FloatWeight):
        return _float_layout(stored, name, scheme)
    if not isinstance(stored, IntegerWeight):
        raise NotKept(f"{scheme.name}: {name} is no matrix in few bits; {KEPT} are kept")
    if scheme.act_order or any(
        part.endswith("g_idx") for part in stored.parts if "weight_" in part
    ):
        raise NotKept(
            f"{scheme.name}: {name} has its inputs in groups by their activations (g_idx); {KEPT} "
            "are kept"
        )
    if stored.group_size % 8 and stored.group_size < stored.shape[-1]:
        raise NotKept(f"{scheme.name}: {name} is in groups of {stored.group_size}; {KEPT} are kept")
    return IntegerLayout(stored.bits, min(stored.group_size, stored.shape[-1]), stored.has_zero)


def _float_layout(stored: FloatWeight, name: str, scheme: Scheme) -> FloatLayout:
    *_, rows, columns = stored.shape
    height, width = stored.block
    if width % 4 and width < columns:
        raise NotKept(f"{scheme.name}: {name} is in blocks of {height}x{width}; {KEPT} are kept")
    return FloatLayout(stored.format, (min(height, rows), min(width, columns)))


def _words(layout: Layout) -> str:
    if isinstance(layout, FloatLayout):
        return f"{layout.format} in blocks of {layout.block[0]}x{layout.block[1]}"
    zero = "with" if layout.has_zero else "without"
    return f"{layout.bits} bits in groups of {layout.group} {zero} zero points"
