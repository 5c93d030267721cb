"""Integers of compressed-tensors (`pack-quantized`): 4 or 8 bits, packed along the inputs.

`weight_packed` is I32 [outputs, inputs * bits / 32], the lowest bits first; values and zero points
are stored plus 2 ** (bits - 1). `weight_scale` is [outputs, groups]; `weight_zero_point`, where
there is one, I32 [outputs * bits / 32, groups], packed along the outputs; `weight_g_idx`, where
there is one, I32 [inputs], the group of each input.

    weight = (value - zero point) * scale
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from engine.weights.entry import Fetch, IntegerRows, Piece, Span, TensorEntry
from engine.weights.formats.blocks import covering, matrix_of, split, spread, unpack
from engine.weights.safetensors_header import CheckpointError


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in packed integers; see `StoredWeight`."""

    parts: Mapping[str, TensorEntry]
    packed: TensorEntry
    scale: TensorEntry
    zero_point: TensorEntry | None
    group_index: TensorEntry | None
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight."""
        rows, words = self.packed.shape
        return rows, words * 32 // self.bits

    @property
    def has_zero(self) -> bool:
        """Return whether groups have zero points of their own."""
        return self.zero_point is not None

    def integers(self, fetch: Fetch) -> Iterator[IntegerRows]:
        """Yield the integers; see `IntegerWeight`."""
        assert self.group_index is None, "groups of consecutive inputs"
        rows, columns = self.shape
        scale, per_word = matrix_of(self.scale, 0, False), 32 // self.bits
        groups, words = (0, scale.shape[1]), (0, self.packed.shape[1])
        for part in split((0, rows), columns):
            q_OI = unpack(fetch(self.packed, part, words), self.bits, (0, columns), 1)
            zero_OG = None
            if self.zero_point is not None:
                stored = fetch(self.zero_point, covering(part, per_word), groups)
                zero_OG = unpack(stored, self.bits, part, 0)
            yield IntegerRows(part[0], q_OI, fetch(scale, part, groups).float(), zero_OG)

    def pieces(self, index: int, rows: Span, columns: Span, fetch: Fetch) -> Iterator[Piece]:
        """Yield dequantised pieces; see `StoredWeight`."""
        assert index == 0, "experts are stored one by one"
        scale, per_word = matrix_of(self.scale, 0, False), 32 // self.bits
        groups, chosen = covering(columns, self.group_size), None
        if self.group_index is not None:
            entry = matrix_of(self.group_index, 0, False)
            chosen = fetch(entry, columns, (0, 1)).flatten().long()
            groups = 0, scale.shape[1]
        words = covering(columns, per_word)

        def of_columns(values: torch.Tensor) -> torch.Tensor:
            if chosen is not None:
                return values[:, chosen]
            return spread(values, columns, self.group_size, 1)

        for part in split(rows, self.shape[1]):
            values = unpack(fetch(self.packed, part, words), self.bits, columns, 1)
            scales = of_columns(fetch(scale, part, groups).float())
            zeros = 1 << self.bits - 1
            if self.zero_point is not None:
                stored = fetch(self.zero_point, covering(part, per_word), groups)
                zeros = of_columns(unpack(stored, self.bits, part, 0))
            yield Piece(part, columns, (values - zeros).float().mul_(scales))


def packed_weight(
    name: str, parts: Mapping[str, TensorEntry], bits: int, group_size: int | None
) -> PackedWeight:
    """Return how to read a weight in packed integers.

    Args:
        name: of the weight, `<module>.weight`.
        parts: the tensors whose names begin with it.
        bits: per value, by config.json.
        group_size: inputs per scale by config.json; None: one scale per output.

    Raises:
        CheckpointError: a part is missing, or the parts do not fit each other.
    """
    packed = parts[f"{name}_packed"]
    scale = parts.get(f"{name}_scale")
    zero_point, group_index = parts.get(f"{name}_zero_point"), parts.get(f"{name}_g_idx")
    if scale is None:
        raise CheckpointError(
            f"{name}_packed in {packed.file} has no {name}_scale; download the rest of the "
            "checkpoint"
        )
    sound = len(packed.shape) == 2 and packed.dtype == "I32" and len(scale.shape) == 2
    if sound:
        rows, words = packed.shape
        if group_size is not None and scale.shape[1] > 1:
            # Groups of a model may have 4 or 8 bits; the number of inputs says which.
            bits = words * 32 // (scale.shape[1] * group_size)
        columns = words * 32 // bits if bits else 0
        group_size = group_size if group_size and scale.shape[1] > 1 else columns
        groups = -(-columns // group_size) if group_size else 0
        sound = bits in (4, 8) and scale.shape == (rows, groups)
        if zero_point is not None:
            sound = sound and zero_point.dtype == "I32"
            sound = sound and zero_point.shape == (-(-rows * bits // 32), groups)
        if group_index is not None:
            sound = sound and group_index.dtype == "I32" and group_index.shape == (columns,)
    if not sound or not group_size:
        shapes = ", ".join(f"{key} {each.dtype} {list(each.shape)}" for key, each in parts.items())
        raise CheckpointError(
            f"{name} in {packed.file}: its parts do not fit each other ({shapes}; config.json has "
            f"{bits} bits and groups of {group_size}); use the files the checkpoint was published "
            "with"
        )
    return PackedWeight(parts, packed, scale, zero_point, group_index, bits, group_size)
