"""MXFP4: two FP4 (E2M1) values per byte, and a power of two per 32 values.

`*_blocks` is U8 [experts, rows, columns / 32, 16], the low half of a byte first; `*_scales` is U8
[experts, rows, columns / 32], exponents with a bias of 127. Rows of a fused gate_up alternate
between gate and up, which is the slot's to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from engine.weights.entry import Fetch, FloatRows, Piece, Span, TensorEntry
from engine.weights.formats.blocks import PANEL, covering, matrix_of, split, spread
from engine.weights.formats.scaled import as_float
from engine.weights.safetensors_header import CheckpointError

_GROUP = 32  # values per scale
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TABLE = torch.tensor([*_VALUES, *(-value for value in _VALUES)])


@dataclass(frozen=True, slots=True)
class Mxfp4Weight:
    """A weight in MXFP4; see `StoredWeight`."""

    parts: Mapping[str, TensorEntry]
    blocks: TensorEntry
    scales: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight."""
        *rows, groups = self.scales.shape
        return (*rows, groups * _GROUP)

    @property
    def format(self) -> Literal["mxfp4"]:
        """Return what its codes are."""
        return "mxfp4"

    @property
    def block(self) -> tuple[int, int]:
        """Return how many rows and columns share a scale."""
        return 1, _GROUP

    def codes(self, index: int, fetch: Fetch) -> Iterator[FloatRows]:
        """Yield all rows of one matrix as they are stored; see `FloatWeight`."""
        stacked = len(self.shape) == 3
        blocks = matrix_of(self.blocks, index, stacked)
        scales = matrix_of(self.scales, index, stacked)
        rows, width = blocks.shape
        for part in split((0, rows), self.shape[-1], PANEL):
            exponents = fetch(scales, part, (0, scales.shape[1]))
            yield FloatRows(part[0], fetch(blocks, part, (0, width)), exponents.view(torch.uint8))

    def pieces(self, index: int, rows: Span, columns: Span, fetch: Fetch) -> Iterator[Piece]:
        """Yield dequantised pieces; see `StoredWeight`."""
        stacked = len(self.shape) == 3
        blocks = matrix_of(self.blocks, index, stacked)
        scales = matrix_of(self.scales, index, stacked)
        across = covering(columns, _GROUP)
        packed = covering(columns, 2)
        for part in split(rows, self.shape[-1]):
            pairs = fetch(blocks, part, packed)
            halves = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
            halves = halves.narrow(1, columns[0] % 2, columns[1] - columns[0])
            values = _TABLE[halves.int()]
            exponents = as_float(fetch(scales, part, across))
            yield Piece(part, columns, values.mul_(spread(exponents, columns, _GROUP, 1)))


def mxfp4_weight(
    blocks_name: str, blocks: TensorEntry, scales_name: str, scales: TensorEntry
) -> Mxfp4Weight:
    """Return how to read a weight in MXFP4. Raises CheckpointError: the parts do not fit."""
    if (*scales.shape, _GROUP // 2) != blocks.shape or len(scales.shape) not in (2, 3):
        raise CheckpointError(
            f"{scales_name} in {scales.file} is {list(scales.shape)} and {blocks_name} "
            f"{list(blocks.shape)}: MXFP4 has {_GROUP // 2} bytes per scale, blocks [experts, "
            "rows, groups, 16]; use the files the checkpoint was published with"
        )
    return Mxfp4Weight({blocks_name: blocks, scales_name: scales}, blocks, scales)
