"""Kept integers: which weights of a quantised checkpoint can be held as the integers they are.

The layout that the experts' product reads (`engine/ops/quantised.py`) has integers of 4 or 8 bits
in groups of consecutive inputs, a multiple of 8 or a whole row, with a scale and perhaps a zero
point. All experts of a layer share it, so their weights must agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.ops.quantised_rows import IntegerLayout
from engine.weights.entry import IntegerWeight, StoredWeight, TensorEntry
from engine.weights.formats.scheme import Scheme

KEPT = (
    "experts of int4 or int8 (compressed-tensors pack-quantized, AWQ, GPTQ) in groups of a "
    "multiple of 8 consecutive inputs, alike in all experts of a layer"
)
Layers = Mapping[int, tuple[Sequence[str], Sequence[str]]]


class NotKept(ValueError):
    """Experts that cannot be held as a checkpoint's integers; the text says why."""


def kept_layouts(
    entries: Mapping[str, TensorEntry], layers: Layers, scheme: Scheme
) -> dict[int, tuple[IntegerLayout, IntegerLayout]]:
    """Return how the experts' matrices are held, of each layer whose experts are quantised.

    Args:
        entries: of the checkpoint's weights.
        layers: layer -> names of its experts' gate and up weights, and of their down weights.
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
        stacked = [name for name, entry in entries.items() if _is_stacked(entry)]
        name = f", such as {stacked[0]}" if stacked else ""
        raise NotKept(f"{scheme.name}{name}: no integers of single experts; {KEPT} are kept")
    return found


def _shared_layout(
    entries: Mapping[str, TensorEntry], names: Sequence[str], scheme: Scheme
) -> IntegerLayout:
    layouts: dict[IntegerLayout, str] = {}
    for name in names:
        layouts.setdefault(_layout(entries[name].stored, name, scheme), name)
    if len(layouts) > 1:
        (one, first), (other, second) = list(layouts.items())[:2]
        raise NotKept(f"{scheme.name}: {first} has {_words(one)}, {second} {_words(other)}")
    return next(iter(layouts), IntegerLayout(4, 8))


def _layout(stored: StoredWeight | None, name: str, scheme: Scheme) -> IntegerLayout:
    if stored is None:
        raise NotKept(f"{scheme.name}: {name} is not quantised, other experts of its layer are")
    if not isinstance(stored, IntegerWeight):
        raise NotKept(f"{scheme.name}: {name} is no matrix of integers; {KEPT} are kept")
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


def _words(layout: IntegerLayout) -> str:
    zero = "with" if layout.has_zero else "without"
    return f"{layout.bits} bits in groups of {layout.group} {zero} zero points"


def _is_stacked(entry: TensorEntry) -> bool:
    return entry.stored is not None and len(entry.shape) == 3
