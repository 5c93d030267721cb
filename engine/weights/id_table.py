"""Id table: a tensor of integers that are numbers of something, such as the experts of each token.

`reader.py` hands it the slots of kind "ids". Every value is checked before it is copied, for a row
of wrong numbers would be found by nothing else: experts that do not exist are read from the memory
of others, and equal ones would be counted twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from engine.distributed.health.progress import OnProgress
from engine.weights.entry import TensorEntry
from engine.weights.reading_buffers import CHUNK_BYTES
from engine.weights.safetensors_header import CheckpointError

ID_DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def read_ids(
    name: str,
    entry: TensorEntry,
    target: torch.Tensor,
    below: int,
    read: Callable[[TensorEntry, torch.Tensor, int], None],
    report: OnProgress,
) -> int:
    """Fill `target` with a whole tensor of integers; return the bytes read.

    Args:
        name: of the tensor, for messages.
        entry: of a tensor of two dimensions.
        target: int64, of its shape.
        below: the values must be from 0 to below - 1, and differ within a row.
        read: fills a vector of bytes from a byte of a tensor.
        report: called once per piece.

    Raises:
        CheckpointError: naming the tensor, the row and the value.
    """
    rows, width = entry.shape
    dtype = ID_DTYPES[entry.dtype]
    row_bytes = width * dtype.itemsize
    step = max(1, CHUNK_BYTES // row_bytes)
    for first in range(0, rows, step):
        part = target[first : first + step]
        memory = torch.empty(part.shape[0] * row_bytes, dtype=torch.uint8)
        read(entry, memory, first * row_bytes)
        ids_RK = memory.view(dtype).view(part.shape).long()
        _check(f"{name} in {entry.file}", ids_RK, first, below)
        part.copy_(ids_RK)
        report()
    return rows * row_bytes


def _check(where: str, ids_RK: torch.Tensor, first: int, below: int) -> None:
    outside_RK = (ids_RK < 0) | (ids_RK >= below)
    if outside_RK.any():
        row, column = outside_RK.nonzero()[0].tolist()
        raise CheckpointError(
            f"{where}: row {first + row} holds {int(ids_RK[row, column])}, which must be from 0 to "
            f"{below - 1}; is config.json of this checkpoint? if so, the file is damaged: download "
            "it again"
        )
    sorted_RK = ids_RK.sort(dim=1).values
    equal_RK = sorted_RK[:, 1:] == sorted_RK[:, :-1]
    if equal_RK.any():
        row, column = equal_RK.nonzero()[0].tolist()
        raise CheckpointError(
            f"{where}: row {first + row} holds {int(sorted_RK[row, column])} twice, and the values "
            "of a row must differ; the file is damaged: download it again"
        )


def dummy_ids(shape: tuple[int, ...], below: int) -> torch.Tensor:
    """Return numbers as `read_ids` allows them, each as often as the others, int64."""
    rows, width = shape
    assert width <= below, "a row has more values than there are"
    return torch.arange(math.prod(shape)).remainder(below).view(rows, width)
