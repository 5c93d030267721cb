"""Where a tensor is stored in a checkpoint, and how a quantised weight is read from several.

`safetensors_header.py` makes the entries of plain tensors, `formats/grouping.py` those of quantised
weights, `reader.py` reads both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch

Span = tuple[int, int]  # [start, stop)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor is stored; of a quantised weight, where its largest part is."""

    file: Path
    dtype: str  # name in the file, such as BF16; of a quantised weight its format's
    shape: tuple[int, ...]
    offset: int  # byte of the file at which its data begins
    num_bytes: int
    is_listed: bool = True  # by the index, where there is one
    stored: StoredWeight | None = None  # how to read it, where it is quantised


class Fetch(Protocol):
    """Reads a block of one matrix of a file, in the file's dtype."""

    def __call__(self, part: TensorEntry, rows: Span, columns: Span) -> torch.Tensor:
        """Return the rows and columns of a part with two dimensions, on the CPU."""
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """Some values of a weight's matrix, dequantised."""

    rows: Span
    columns: Span
    values: torch.Tensor  # float32, of that shape, on the CPU


class StoredWeight(Protocol):
    """A quantised weight as the files hold it: its tensors, and how they become values.

    Its last two dimensions are a matrix [outputs, inputs] as the engine multiplies with; a third
    one before them stacks experts.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight."""
        ...

    @property
    def parts(self) -> Mapping[str, TensorEntry]:
        """Return the tensors in the files by name."""
        ...

    def pieces(self, index: int, rows: Span, columns: Span, fetch: Fetch) -> Iterator[Piece]:
        """Yield the dequantised values of a block of one matrix, piece by piece.

        Args:
            index: of the matrix in the stack, 0 where there is no stack.
            rows, columns: of the block; they need not be at the edges of scales or packed words.
            fetch: reads from the files.

        Pieces together cover the block. Those of rows begin at an even distance from its first row.
        """
        ...


@dataclass(frozen=True, slots=True)
class IntegerRows:
    """Some rows of a matrix of integers: a weight is (q - zero) * scale."""

    first: int  # row of the matrix
    q_OI: torch.Tensor  # from 0 to 2^bits - 1
    scale_OG: torch.Tensor  # float32, of each group of consecutive inputs
    zero_OG: torch.Tensor | None  # of each group; None: 2^(bits - 1) everywhere


@runtime_checkable
class IntegerWeight(StoredWeight, Protocol):
    """A weight that is a matrix of integers in groups, and may be held as these."""

    @property
    def bits(self) -> int:
        """Return the bits of an integer."""
        ...

    @property
    def group_size(self) -> int:
        """Return how many inputs share a scale."""
        ...

    @property
    def has_zero(self) -> bool:
        """Return whether groups have zero points of their own."""
        ...

    def integers(self, fetch: Fetch) -> Iterator[IntegerRows]:
        """Yield all rows, piece by piece.

        Raises:
            CheckpointError: groups that are not consecutive inputs.
        """
        ...


@dataclass(frozen=True, slots=True)
class FloatRows:
    """Some rows of a matrix of small floats: a weight is its code times a scale."""

    first: int  # row of the matrix
    codes_OB: (
        torch.Tensor
    )  # uint8, of FP8 a weight per byte, of MXFP4 two, the first in the low half
    scale_OG: torch.Tensor  # of each group of every row: float32, of MXFP4 its exponents as uint8


@runtime_checkable
class FloatWeight(StoredWeight, Protocol):
    """A weight in FP8 E4M3 or MXFP4, which may be held as it is stored."""

    @property
    def format(self) -> Literal["mxfp4", "fp8"]:
        """Return what its codes are."""
        ...

    @property
    def block(self) -> tuple[int, int]:
        """Return how many rows and columns share a scale."""
        ...

    def codes(self, index: int, fetch: Fetch) -> Iterator[FloatRows]:
        """Yield all rows of one matrix of the stack, piece by piece."""
        ...
