"""Weights: which checkpoint tensors fill a model of transformers, by transformers' key mapping.

A checkpoint's names differ from the module's where its family was published before transformers
fused experts. The mapping renames tensors, and joins the matrices of single experts:

    model.layers.0.block_sparse_moe.experts.3.w1.weight  ->  rows of model.layers.0.mlp.experts.
                                                             gate_up_proj[3]

The same matrices fill this engine's experts here, those of this rank alone. What else the mapping
would compute is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.models.expert_weights import (
    alternating_slots,
    single_slots,
    stacked_slots,
    transposed_slots,
)
from engine.models.spec import MoENames
from engine.models.transformers_model.plug_in import plug_in
from engine.models.transformers_model.text_model import FAMILY_OF
from engine.moe.layer import MoELayer
from engine.moe.stacked_experts import StackedExperts
from engine.weights.slot import WeightSlot

_EXPERT = re.compile(r"(?P<prefix>.*)\.(?P<expert>\d+)\.(?P<matrix>\w+)\.weight")


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint."""

    name: str
    part: int | None = None  # which of a converter's sources it is; None: it is only renamed
    converter: Any = None


class KeyMapping:
    """Transformers' key mapping of one model."""

    def __init__(self, model: Any) -> None:
        plug = plug_in()
        mapping = plug.mapping_of(model)
        if (family := FAMILY_OF.get(model.config.model_type)) is not None:
            mapping = [*(plug.mapping_of_type(family) or ()), *mapping]
        self._converters = [each for each in mapping if isinstance(each, plug.converter)]
        self._renamings = [each for each in mapping if not isinstance(each, plug.converter)]
        self._prefix = model.base_model_prefix
        self._targets = dict.fromkeys(model.state_dict(), True)

    def sources(self, checkpoint: Collection[str]) -> dict[str, list[Source]]:
        """Return tensor of the model -> the checkpoint's tensors that fill it, in order."""
        plug, found = plug_in(), {}
        for name in sorted(checkpoint):
            target, pattern = plug.rename(
                name, self._renamings, self._converters, self._prefix, self._targets
            )
            source = Source(name)
            if pattern is not None:
                converter = next(c for c in self._converters if pattern in c.source_patterns)
                source = Source(name, converter.source_patterns.index(pattern), converter)
            found.setdefault(target, []).append(source)
        return found


def dense_slots(
    tensors: Mapping[str, torch.Tensor], sources: Mapping[str, list[Source]]
) -> Iterator[WeightSlot]:
    """Yield a slot for every tensor that is no expert's.

    Args:
        tensors: name in the model -> the tensor.
        sources: of `KeyMapping.sources`.

    Raises:
        ValueError: the mapping computes one of them from others.
    """
    for name, tensor in tensors.items():
        source = next(iter(sources.get(name, ())), Source(name))
        if source.converter is not None:
            raise ValueError(
                f"{source.name}: transformers converts this tensor "
                f"({_operations(source.converter)}), and model.implementation = transformers reads "
                "tensors as they are stored"
            )
        is_vector = tensor.dim() < 2
        kind = "bias" if name.endswith("bias") else "norm" if is_vector else "matrix"
        yield WeightSlot(source.name, tensor, tuple(tensor.shape), kind=kind)


def expert_slots(
    moe: MoELayer, path: str, layout: StackedExperts, sources: Mapping[str, list[Source]]
) -> Iterator[WeightSlot]:
    """Yield the slots of one layer's experts.

    Args:
        moe: the layer.
        path: of the experts' module in the model.
        layout: of that module.
        sources: of `KeyMapping.sources`.

    Raises:
        ValueError: the mapping computes them in another way than by stacking experts.
    """
    first = "gate_up_proj" if moe.spec.experts.gated else "up_proj"
    inner, outer = sources.get(f"{path}.{first}", []), sources.get(f"{path}.down_proj", [])
    turned = _are_turned(inner, outer)
    if not turned and any(source.converter is not None for source in (*inner, *outer)):
        yield from _single_slots(moe, inner, outer)
        return
    names = {
        f"{path}.{each}": found[0].name
        for each, found in ((first, inner), ("down_proj", outer))
        if found
    }
    stacked = stacked_slots
    if layout.transposed:
        stacked = alternating_slots if layout.alternating else transposed_slots
    slots = list(stacked(moe, path))
    if turned:
        both = zip(slots, transposed_slots(moe, path), strict=True)
        slots = [replace(slot, turned=each) for slot, each in both]
    for slot in slots:
        name = names.get(slot.name, slot.name)
        plain = None if slot.unquantised is None else replace(slot.unquantised, name=name)
        yield replace(slot, name=name, unquantised=plain)


def with_tied_head(
    slots: Iterable[WeightSlot],
    weight: torch.Tensor,
    head: str,
    checkpoint: Collection[str],
    untie: Callable[[], torch.Tensor],
) -> Iterator[WeightSlot]:
    """Yield slots, and what a checkpoint may hold of a head that is the embedding.

    Args:
        slots: without the head's.
        weight: of the embedding.
        head: the head's name.
        checkpoint: names of the tensors in the checkpoint.
        untie: gives the head memory of its own.
    """
    for slot in slots:
        if slot.target is not weight:
            yield slot
            continue
        yield replace(slot, aliases=(head,))
        if slot.name in checkpoint and head in checkpoint:
            shape = slot.full_shape
            yield WeightSlot(head, weight, shape, tied_to=slot.name, untie=untie)


def _single_slots(moe: MoELayer, inner: list[Source], outer: list[Source]) -> Iterator[WeightSlot]:
    """Yield the slots of experts that the checkpoint has one by one."""
    plug = plug_in()
    parts = moe.spec.experts.parts
    found: dict[int, str] = {}  # of inner matrices
    prefix = w2 = ""
    for source, count in (*((each, parts) for each in inner), *((each, 1) for each in outer)):
        match, converter = _EXPERT.fullmatch(source.name), source.converter
        wanted = [plug.merge] + ([plug.concatenate] if count > 1 else [])
        operations = [] if converter is None else [type(each) for each in converter.operations]
        if match is None or operations != wanted or source.part not in range(count):
            raise ValueError(
                f"{source.name}: transformers makes experts of this tensor in its own way "
                f"({_operations(converter)}), which model.implementation = transformers does not"
            )
        prefix = match["prefix"]
        if count == parts and source in inner:
            found[source.part or 0] = match["matrix"]
        else:
            w2 = match["matrix"]
    if len(found) < parts or not w2:
        raise ValueError(
            f"{prefix}: the checkpoint has no matrices of single experts for all of "
            f"{', '.join(['gate', 'up'][-parts:])} and down; use the files it was published with"
        )
    names = MoENames(w1=found[0], w3=found[parts - 1], w2=w2)
    yield from single_slots(moe, prefix, names)


def _are_turned(inner: list[Source], outer: list[Source]) -> bool:
    """Return whether the mapping turns stacked matrices whose shape is not the model's."""
    operations = [
        operation
        for source in (*inner, *outer)
        for operation in (() if source.converter is None else source.converter.operations)
    ]
    return bool(operations) and all(
        type(each) is plug_in().transpose and each.check_dims and {each.dim0, each.dim1} == {1, 2}
        for each in operations
    )


def _operations(converter: Any) -> str:
    operations = () if converter is None else converter.operations
    return ", ".join(type(each).__name__ for each in operations) or "no operation"
