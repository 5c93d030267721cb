"""Row buffers of the MoE layers: one set, used by every layer of a model.

Layers run one after the other, so one set serves all. On CUDA, and under a capacity policy, where a
rank receives at most what its experts may keep, `reserve` allocates the buffers before the first
step (their size is `engine.generation.memory.row_bound`); else they grow to the largest step seen.

Legend: D model dim.
"""

from __future__ import annotations

from enum import IntEnum

import torch

from engine.moe.dispatch.transports.choice import TransportPool


class Slot(IntEnum):
    """What a buffer holds; see `payload.py`."""

    SEND = 0
    RECV = 1
    EXPERT = 2


class RowBuffers:
    """Three buffers of bytes, one per slot."""

    def __init__(self) -> None:
        self.transports = TransportPool()  # with buffers of their own, shared as these are
        self.num_growths = 0  # reallocations since `reserve`
        self._buffers: dict[Slot, torch.Tensor] = {}
        self._last: dict[Slot, tuple[tuple[object, ...], torch.Tensor]] = {}
        self._second: RowBuffers | None = None

    @property
    def second(self) -> RowBuffers:
        """The buffers of a step's second micro-batch, in use at the same time as the first's."""
        if self._second is None:
            self._second = RowBuffers()
        return self._second

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        own = sum(buffer.numel() for buffer in self._buffers.values())
        return own if self._second is None else own + self._second.num_bytes

    def rows(self, slot: Slot, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        """Return the slot's buffer as [num_rows, D], with the width, dtype and device of `like`.

        Contents are undefined. A slot has one buffer: what it held before is overwritten.
        """
        width = like.shape[1]
        # Most layers of a step ask for the same shape.
        wanted, last = (num_rows, width, like.dtype, like.device), self._last.get(slot)
        if last is not None and last[0] == wanted:
            return last[1]
        flat = self.bytes(slot, num_rows * width * like.element_size(), like.device)
        rows = flat.view(like.dtype).view(num_rows, width)
        self._last[slot] = wanted, rows
        return rows

    def bytes(self, slot: Slot, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Return the slot's buffer as uint8 [num_bytes]."""
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < num_bytes or buffer.device != device:
            # A quarter more than asked for: loads rise gradually, and a new buffer copies no row.
            self._allocate(slot, num_bytes * 5 // 4, device)
        return self._buffers[slot][:num_bytes]

    def reserve(self, sizes: dict[Slot, int], device: torch.device) -> None:
        """Allocate buffers of `sizes` bytes each, in place of those there are."""
        for slot, size in sizes.items():
            self._allocate(slot, size, device)
        self.num_growths = 0

    def _allocate(self, slot: Slot, size: int, device: torch.device) -> None:
        self._last.pop(slot, None)
        self._buffers.pop(slot, None)  # first, so that old and new never exist at the same time
        self._buffers[slot] = torch.empty(size, dtype=torch.uint8, device=device)
        self.num_growths += 1
