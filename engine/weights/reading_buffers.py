"""What the threads of a reader share and own: open files, and buffers between file and target."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from engine.weights.safetensors_header import CheckpointError

CHUNK_BYTES = 4 << 20  # one read: large for a file system, and still in cache when it is checked


class Staging:
    """Buffer of one thread between file and target; pinned where the target is on a GPU."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def take(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Return memory to read so many bytes into, for a target on a device."""
        pinned = device.type == "cuda"
        if len(self._buffer) < num_bytes or self._pinned != pinned:
            size = max(num_bytes, CHUNK_BYTES)
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            self._pinned = pinned
        return self._buffer[:num_bytes]

    def give_back(self, device: torch.device) -> None:
        """Wait until a copy to the device has left the buffer."""
        if device.type == "cuda":
            # SYNC: the copy must have left the buffer before the next read overwrites it.
            torch.cuda.current_stream(device).synchronize()


class Files:
    """File descriptors by path, shared by all readers and opened on first use."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def open(self, path: Path) -> int:
        """Return a file's descriptor."""
        if path not in self._descriptors:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
            if self._descriptors.setdefault(path, descriptor) != descriptor:
                os.close(descriptor)  # another reader was faster
        return self._descriptors[path]

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
