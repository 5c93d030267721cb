"""Workspace: the row buffers of the MoE layers, made once and used by every layer of a model.

Layers run one after the other, so one set serves all. Under a capacity policy a rank receives at
most what its experts may keep, so `reserve` makes the buffers for good before the first step (their
size is `engine.memory.capacity_rows`); without one they grow to the largest step seen.

Legend: R rows, D model dim.
"""

from __future__ import annotations

from enum import IntEnum

import torch


class Slot(IntEnum):
    """What a buffer holds; see `dispatcher.py` for the way of the rows."""

    SEND = 0
    ARRIVED = 1
    GROUPED = 2


class Workspace:
    """Three flat buffers. num_growths: how often one had to be made anew."""

    def __init__(self) -> None:
        self.num_growths = 0
        self._buffers: dict[Slot, torch.Tensor] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    def rows(self, slot: Slot, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        """A buffer of [num_rows, D] with the width, dtype and device of `like`; contents unknown.

        It is the slot's only one: what the slot held before is overwritten.
        """
        width = like.shape[1]
        buffer = self._buffers.get(slot)
        if (
            buffer is None
            or buffer.numel() < num_rows * width
            or buffer.dtype != like.dtype
            or buffer.device != like.device
        ):
            # A quarter more than asked for: loads creep up, and each growth copies no row.
            self._make(slot, num_rows * width * 5 // 4, like.dtype, like.device)
        return self._buffers[slot][: num_rows * width].view(num_rows, width)

    def reserve(
        self,
        send_rows: int,
        received_rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make all buffers for so many rows, once and for all."""
        for slot in Slot:
            rows = send_rows if slot is Slot.SEND else received_rows
            self._make(slot, rows * width, dtype, device)
        self.num_growths = 0

    def _make(self, slot: Slot, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._buffers.pop(slot, None)  # first, so that old and new are never there together
        self._buffers[slot] = torch.empty(size, dtype=dtype, device=device)
        self.num_growths += 1
