"""Row sinks: matrices that are not held as the values that the files have.

Experts that are quantised as they are loaded have no memory for their values. Their slots have a
sink instead, and a target on the meta device that says how the values of the file lie in the rows
of the sink's matrix. A reader takes memory for the rows of one slot, fills it and hands it over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

_Result = TypeVar("_Result")

# Quantising needs several times the memory of some rows, and runs in as many threads as one may
# use: readers take turns.
_ONE_AT_A_TIME = threading.Lock()


class RowSink(Protocol):
    """Some rows of a matrix, held in a form of their own. Each is filled once, by any thread."""

    device: torch.device  # where values are taken
    shape: tuple[int, int]  # rows and columns
    keeps_stored: bool  # whether what a checkpoint holds is taken as it is
    num_bytes: int  # that the rows are held in

    def take(self, rows_OI: torch.Tensor) -> None:
        """Take all rows."""
        ...

    def take_integers(
        self,
        first: int,
        q_OI: torch.Tensor,
        scale_OG: torch.Tensor,
        zero_OG: torch.Tensor | None,
    ) -> None:
        """Take some of the rows as integers, from row `first` of the sink on.

        Args:
            q_OI: from 0 to 2^bits - 1.
            scale_OG: of each group.
            zero_OG: of each group; None: 2^(bits - 1) everywhere.
        """
        ...

    def take_floats(self, first: int, codes_OB: torch.Tensor, scale_OG: torch.Tensor) -> None:
        """Take some of the rows as FP8 or MXFP4, from row `first` of the sink on.

        Args:
            codes_OB: uint8, the bytes of each row; all are numbers.
            scale_OG: of each group of every row, float32 or the exponents of MXFP4, uint8.
        """
        ...


def fill_sink(
    sink: RowSink, target: torch.Tensor, fill: Callable[[torch.Tensor], _Result]
) -> _Result:
    """Hand over rows that `fill` writes to memory of their own; return its result.

    Args:
        target: a view, on the meta device, of a tensor of the sink's shape alone in its storage.
        fill: is given that view of real memory.
    """
    rows_OI = torch.empty(sink.shape, dtype=target.dtype, device=sink.device)
    view = rows_OI.as_strided(target.size(), target.stride(), target.storage_offset())
    result = fill(view)
    with _ONE_AT_A_TIME:
        sink.take(rows_OI)
    return result
