"""Blocks: arithmetic that the formats share, on the ranges of a matrix and on packed words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from engine.weights.entry import Span, TensorEntry

PANEL = 16  # rows that low-bit weights hold together: pieces of these are written at once
_PIECE_VALUES = 1 << 19  # of one piece: 2 MiB in float32, a few of which live per reading thread


def split(span: Span, width: int, multiple: int = 2) -> Iterator[Span]:
    """Yield consecutive ranges of `span`, of a length that is a multiple but for the last one.

    Args:
        span: to cut.
        width: values that each of its lines holds; a range has about `_PIECE_VALUES` values.
        multiple: of lines.
    """
    start, stop = span
    step = max(multiple, _PIECE_VALUES // max(1, width) // multiple * multiple)
    for low in range(start, stop, step):
        yield low, min(low + step, stop)


def matrix_of(entry: TensorEntry, index: int, is_stacked: bool) -> TensorEntry:
    """Return one matrix of a tensor, with two dimensions.

    Dimensions past the second of a matrix count as columns; a missing one is of size 1.

    Args:
        index: of the matrix, where the tensor's first dimension stacks them.
    """
    shape, offset, num_bytes = entry.shape, entry.offset, entry.num_bytes
    if is_stacked:
        num_bytes //= shape[0]
        shape, offset = shape[1:], offset + index * num_bytes
    shape = (*(shape[:1] or (1,)), math.prod(shape[1:]))
    return replace(entry, shape=shape, offset=offset, num_bytes=num_bytes)


def covering(span: Span, size: int) -> Span:
    """Return the range of blocks of `size` lines that holds a range of lines."""
    start, stop = span
    return start // size, -(-stop // size)


def spread(values: torch.Tensor, span: Span, size: int, dim: int) -> torch.Tensor:
    """Repeat the values of the blocks that cover a range of lines, one per line of it; a single
    one is left to broadcasting.

    Args:
        values: of the blocks `covering(span, size)`, along `dim`.
        span: the lines.
        size: lines per block.
    """
    if size == 1 or values.shape[dim] == 1:
        return values
    repeated = values.repeat_interleave(size, dim)
    return repeated.narrow(dim, span[0] % size, span[1] - span[0])


def unpack(words: torch.Tensor, bits: int, span: Span, dim: int) -> torch.Tensor:
    """Return the unsigned integers of a range of lines, packed low bits first in int32 words.

    Args:
        words: [rows, columns] int32, those that cover the range along `dim`.
        bits: per value; divides 32.
        span: the lines, along `dim`.

    Returns:
        int32 values.
    """
    per_word = 32 // bits
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    apart = words.unsqueeze(dim + 1)
    shape = [1] * apart.dim()
    shape[dim + 1] = per_word
    values = (apart >> shifts.view(shape)) & ((1 << bits) - 1)
    return values.flatten(dim, dim + 1).narrow(dim, span[0] % per_word, span[1] - span[0])
