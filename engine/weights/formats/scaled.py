"""FP8: a weight in E4M3 and its scales, one per tensor, per row, or per block of the matrix.

    weight = values * scales, each scale repeated over its block

The scales are named `weight_scale_inv` (DeepSeek: blocks of 128 x 128, float32 or powers of two) or
`weight_scale` (compressed-tensors and modelopt: per tensor, per row or per block). Blocks at the
edge of a matrix may be incomplete: 576 rows in blocks of 128 have 5 scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from engine.weights.entry import Fetch, FloatRows, Piece, Span, TensorEntry
from engine.weights.formats.blocks import PANEL, covering, matrix_of, split, spread
from engine.weights.safetensors_header import CheckpointError

SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_EXPONENT_BIAS = 127  # of E8M0, the exponent of a float32 alone


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """A weight in FP8 with scales; see `StoredWeight`."""

    parts: Mapping[str, TensorEntry]
    weight: TensorEntry
    scale: TensorEntry
    block: tuple[int, int]  # rows and columns per scale

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight."""
        return self.weight.shape

    @property
    def format(self) -> Literal["fp8"]:
        """Return what its codes are."""
        return "fp8"

    def codes(self, index: int, fetch: Fetch) -> Iterator[FloatRows]:
        """Yield all rows of one matrix as they are stored; see `FloatWeight`."""
        stacked = len(self.shape) == 3
        weight = matrix_of(self.weight, index, stacked)
        scale = matrix_of(self.scale, index, stacked)
        rows, width = weight.shape
        height, across = self.block[0], (0, scale.shape[1])
        for part in split((0, rows), width, PANEL):
            scale_OG = as_float(fetch(scale, covering(part, height), across))
            scale_OG = spread(scale_OG, part, height, 0).expand(part[1] - part[0], -1)
            codes_OB = fetch(weight, part, (0, width)).view(torch.uint8)
            yield FloatRows(part[0], codes_OB, scale_OG)

    def pieces(self, index: int, rows: Span, columns: Span, fetch: Fetch) -> Iterator[Piece]:
        """Yield dequantised pieces; see `StoredWeight`."""
        stacked = len(self.shape) == 3
        weight, scale = (
            matrix_of(self.weight, index, stacked),
            matrix_of(self.scale, index, stacked),
        )
        height, width = self.block
        across = covering(columns, width)
        for part in split(rows, weight.shape[1]):
            scales = as_float(fetch(scale, covering(part, height), across))
            scales = spread(spread(scales, part, height, 0), columns, width, 1)
            yield Piece(part, columns, decode(fetch(weight, part, columns)).mul_(scales))


def scaled_weight(
    name: str, weight: TensorEntry, scale_name: str, scale: TensorEntry, block: Span | None
) -> ScaledWeight:
    """Return how to read a weight in FP8.

    Args:
        name: of the weight, for messages.
        block: rows and columns per scale by config.json; None: as the shapes say.

    Raises:
        CheckpointError: the scales do not fit the weight.
    """
    if scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{scale_name} in {scale.file}: scales of dtype {scale.dtype} are not read, only "
            f"{', '.join(SCALE_DTYPES)}; convert the checkpoint to bfloat16"
        )
    *stack, rows, columns = weight.shape
    grid = _grid(scale.shape, len(stack) + 2)
    sizes = None
    if grid is not None and grid[:-2] == tuple(stack):
        sizes = _block(rows, columns, grid[-2:], block)
    if sizes is None:
        raise CheckpointError(
            f"{scale_name} in {scale.file} is {list(scale.shape)}, which are no scales of {name} "
            f"{list(weight.shape)}: read are one, one per row, or one per block of "
            f"{'x'.join(map(str, block)) if block else 'equal size'}; is config.json of this "
            "checkpoint?"
        )
    return ScaledWeight({name: weight, scale_name: scale}, weight, scale, sizes)


def _grid(shape: tuple[int, ...], num_dims: int) -> tuple[int, ...] | None:
    """Return the shape of the scales with one dimension per dimension of the weight."""
    if len(shape) <= 1 and num_dims == 2:
        return (*shape, 1) if shape else (1, 1)
    if len(shape) == 1 and num_dims == 3:  # one per expert of a stack
        return (*shape, 1, 1)
    return shape if len(shape) == num_dims else None


def _block(
    rows: int, columns: int, grid: tuple[int, ...], block: Span | None
) -> tuple[int, int] | None:
    """Return rows and columns per scale, None where the grid does not fit."""
    down, across = grid
    if block is not None and (down, across) not in ((1, 1), (rows, 1)):
        return block if grid == (-(-rows // block[0]), -(-columns // block[1])) else None
    if not across or not down or rows % down or columns % across:
        return None
    return max(1, rows // down), max(1, columns // across)


def decode(values: torch.Tensor) -> torch.Tensor:
    """Return E4M3 values in float32, as `float()` does, some 15 times faster on a CPU.

    Their bits, moved, are those of a float16 that is 2 ** 8 times smaller, also where it is
    subnormal. All but the largest exponent of float16 occur, so NaN is put back by hand.
    """
    bits = values.view(torch.uint8).to(torch.int16)
    codes = bits & 0x7F
    halves = (codes << 7) | ((bits & 0x80) << 8)
    result = halves.view(torch.float16).float().mul_(256.0)
    return result.masked_fill_(codes == 0x7F, torch.nan) if codes.max() == 0x7F else result


def as_float(scales: torch.Tensor) -> torch.Tensor:
    """Return scales in float32; E8M0 in either of its dtypes are powers of two."""
    if scales.dtype == torch.float8_e8m0fnu:
        scales = scales.view(torch.uint8)
    if scales.dtype == torch.uint8:
        return torch.where(
            scales == 255, torch.nan, (scales.float() - _EXPONENT_BIAS).exp2()
        )  # 255 is NaN
    return scales.float()
