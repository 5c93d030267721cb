"""Stored reader: a shard of a quantised weight, from its tensors in the files into the target.

`reader.py` hands it each weight whose entry says how it is stored (`engine/weights/formats/`). The
weight is dequantised piece by piece, a few MiB at a time, so peak memory is the targets' and some
MiB per thread. Every value is checked before it is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

from engine.distributed.health.progress import OnProgress
from engine.weights.entry import (
    FloatRows,
    FloatWeight,
    IntegerWeight,
    Piece,
    Span,
    StoredWeight,
    TensorEntry,
)
from engine.weights.formats.scaled import as_float
from engine.weights.row_sink import RowSink
from engine.weights.safetensors_header import CheckpointError

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I32": torch.int32,
}
_LARGEST = {"fp8": 448.0, "mxfp4": 6.0}  # before its scale
_LEAST_BYTES = 1024  # a shorter part of a row is not read alone: the calls would take longer

ReadBytes = Callable[[TensorEntry, torch.Tensor, int], None]


class _Fetch:
    """Reads blocks of matrices; see `engine.weights.entry.Fetch`."""

    def __init__(self, read: ReadBytes) -> None:
        self._read = read
        self.num_bytes = 0

    def __call__(self, part: TensorEntry, rows: Span, columns: Span) -> torch.Tensor:
        (first, last), (left, right) = rows, columns
        dtype, width = DTYPES[part.dtype], part.shape[1]
        row_bytes, cut_bytes = width * dtype.itemsize, (right - left) * dtype.itemsize
        alone = _LEAST_BYTES <= cut_bytes < row_bytes
        kept = cut_bytes if alone else row_bytes
        memory = torch.empty(last - first, kept, dtype=torch.uint8)
        self.num_bytes += memory.numel()
        if not alone:
            self._read(part, memory.view(-1), first * row_bytes)
            return memory.view(dtype)[:, left:right]
        for row in range(first, last):
            self._read(part, memory[row - first], row * row_bytes + left * dtype.itemsize)
        return memory.view(dtype)


def read_stored(
    name: str,
    stored: StoredWeight,
    target: torch.Tensor,
    bounds: tuple[Span, ...],
    read: ReadBytes,
    report: OnProgress,
) -> int:
    """Fill `target` with a shard of a quantised weight; return the bytes read.

    Args:
        name: of the weight, for messages.
        target: of the bounds' shape.
        bounds: per dimension of the weight; more than it has where the target cuts its rows.
        read: fills a vector of bytes from a byte of a tensor.
        report: called once per piece.

    Raises:
        CheckpointError: NaN, infinity, or values that the target's dtype cannot hold.
    """
    fetch = _Fetch(read)
    if target.numel() == 0:
        return 0
    where = f"{name} (from {', '.join(stored.parts)})"
    *_, rows, width = stored.shape
    is_stacked = len(stored.shape) == 3
    first, last = bounds[0] if is_stacked else (0, 1)
    cut_rows, columns = (bounds[-2], bounds[-1])
    if len(bounds) != len(stored.shape):  # the target's rows are cut further: all are read
        cut_rows, columns = (0, rows), (0, width)
    for index in range(first, last):
        matrix = target[index - first] if is_stacked else target
        for piece in stored.pieces(index, cut_rows, columns, fetch):
            _check(piece, where, target.dtype)
            _place(piece, matrix, cut_rows[0], columns[0])
            report()
    return fetch.num_bytes


def read_kept(
    name: str,
    stored: StoredWeight,
    index: int,
    sink: RowSink,
    dtype: torch.dtype,
    read: ReadBytes,
    report: OnProgress,
) -> int:
    """Hand a whole matrix to a sink as it is stored; return the bytes read.

    Args:
        name: of the weight, for messages.
        stored: a matrix of integers or small floats (`formats/kept.py`), or a stack of these.
        index: of the matrix in the stack, 0 where there is no stack.
        dtype: what the matrix is dequantised to where it is multiplied.
        read: fills a vector of bytes from a byte of a tensor.
        report: called once per some rows.

    Raises:
        CheckpointError: codes or scales that are not finite, values that the dtype cannot hold, or
            groups that are not consecutive inputs.
    """
    fetch, is_finite, largest = _Fetch(read), True, 0.0
    where = f"{name} (from {', '.join(stored.parts)})"
    if isinstance(stored, IntegerWeight):
        for rows in stored.integers(fetch):
            if is_finite := bool(rows.scale_OG.isfinite().all()):
                largest = max(largest, (1 << stored.bits) * float(rows.scale_OG.abs().max()))
                sink.take_integers(rows.first, rows.q_OI, rows.scale_OG, rows.zero_OG)
            report()
            if not is_finite:
                break
    else:
        assert isinstance(stored, FloatWeight), "no other is kept"
        for rows in stored.codes(index, fetch):
            if is_finite := _are_numbers(rows, stored.format):
                scale = float(as_float(rows.scale_OG).abs().max())
                largest = max(largest, _LARGEST[stored.format] * scale)
                sink.take_floats(rows.first, rows.codes_OB, rows.scale_OG)
            report()
            if not is_finite:
                break
    if not is_finite:
        raise CheckpointError(
            f"{where}: holds NaN or infinity; the checkpoint is damaged or diverged in training"
        )
    if largest > torch.finfo(dtype).max:  # by the scales: not all codes need be that large
        *_, rows, columns = stored.shape
        for piece in stored.pieces(index, (0, rows), (0, columns), _Fetch(read)):
            _check(piece, where, dtype)
    return fetch.num_bytes


def _are_numbers(rows: FloatRows, kind: Literal["mxfp4", "fp8"]) -> bool:
    """Return whether rows have neither a code nor a scale that is not finite."""
    if kind == "mxfp4":  # every code is a number
        return not bool((rows.scale_OG == 255).any())
    is_nan = (rows.codes_OB & 127) == 127
    return bool(rows.scale_OG.isfinite().all()) and not bool(is_nan.any())


def _place(piece: Piece, matrix: torch.Tensor, first_row: int, first_column: int) -> None:
    """Copy a piece to its place in a matrix, whose rows may be several dimensions."""
    inner = math.prod(matrix.shape[1:-1])
    start, stop = ((row - first_row) // inner for row in piece.rows)
    left, right = (column - first_column for column in piece.columns)
    values = piece.values.reshape(stop - start, *matrix.shape[1:-1], right - left)
    matrix[start:stop, ..., left:right].copy_(values)


def _check(piece: Piece, where: str, dtype: torch.dtype) -> None:
    low, high = torch.aminmax(piece.values)
    worst = torch.stack((low, high))
    if not worst.isfinite().all():
        raise CheckpointError(
            f"{where}: holds NaN or infinity; the checkpoint is damaged or diverged in training"
        )
    if not worst.to(dtype).isfinite().all():
        raise CheckpointError(
            f"{where}: holds values too large for {dtype}; set model.dtype to bfloat16 or float32"
        )
