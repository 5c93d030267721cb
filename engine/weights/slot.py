"""A parameter and the checkpoint tensors that fill it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from engine.weights.row_sink import RowSink


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """One tensor of the checkpoint and its destination on this rank.

    One tensor may fill several slots.
    """

    name: str
    target: torch.Tensor  # destination view, of the shard's shape
    full_shape: tuple[int, ...]  # of the tensor in the file
    shard: tuple[slice, ...] | None = None  # this rank's share: slices without step of the first
    # dimensions; None: all of it
    # ids: whole numbers of two dimensions, see `id_table.py`
    kind: Literal["matrix", "norm", "bias", "ids"] = "matrix"
    ids_below: int = 0  # of ids, which are from 0 to ids_below - 1 and differ within a row
    aliases: tuple[str, ...] = ()  # other names of the tensor in a file
    # The tensor that the configuration says this one equals. The slot is then filled only where the
    # files hold another tensor under `name`, and `untie` returns memory of its own for it.
    tied_to: str | None = None
    untie: Callable[[], torch.Tensor] | None = None
    # Shape in the file where `full_shape` cuts its dimensions further: a fused gate_up whose rows
    # alternate is [E, 2F, D] there and [E, F, 2, D] here. Only the first dimension is then sharded.
    file_shape: tuple[int, ...] | None = None
    # Where the values go instead of the target, which is then on the meta device (`row_sink.py`).
    sink: RowSink | None = None
    # Added to every value, in float32: norms whose weights the files hold as what is above 1.
    offset: float = 0.0
    # How to read the tensor where the files hold it unquantised in another layout; None: alike.
    unquantised: WeightSlot | None = None
    # How to read it where the files' shape is this slot's and not this one's; None: it is refused.
    turned: WeightSlot | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes in which this rank holds the tensor's share."""
        if self.sink is not None:
            return self.sink.num_bytes
        return self.target.numel() * self.target.element_size()

    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Return [start, stop) of the shard in every dimension of the file's tensor."""
        whole = slice(None)
        shard = (self.shard or ()) + (whole,) * (len(self.full_shape) - len(self.shard or ()))
        parts = [part.indices(size) for part, size in zip(shard, self.full_shape, strict=True)]
        assert all(step == 1 for _, _, step in parts), self.name
        assert tuple(self.target.shape) == tuple(stop - start for start, stop, _ in parts), (
            f"{self.name}: target {tuple(self.target.shape)}, shard {self.shard} of "
            f"{self.full_shape}"
        )
        return tuple((start, stop) for start, stop, _ in parts)
