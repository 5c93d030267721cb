"""The ranks of one host exchange bytes in shared memory: one rank's end. Sources: csrc/lane.h.

A segment of every rank is mapped by all; in it a ring of bytes for each rank it sends to. There is
no torch reference to fall back to: where the compiled library is missing, torch.distributed serves
(`engine/distributed/shared_memory.py` decides).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from engine.ops import native

# A ring holds what one rank has sent and the other has not yet read. One that takes all rows of a
# half batch lets both go on computing: what does not fit goes out when the sender waits next.
_SEGMENT_BYTES = 1 << 22
_LEAST_RING_BYTES = 1 << 19


def ring_bytes(size: int) -> int:
    """Bytes of the ring between two ranks of a group of `size`."""
    return max(_LEAST_RING_BYTES, _SEGMENT_BYTES // max(1, size - 1) // 4096 * 4096)


def available() -> bool:
    """Whether the compiled library can open lanes here."""
    return native.available() and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")


def make_segment(size: int, ring: int | None = None) -> int:
    """A file descriptor of a new segment, zeros, for a group of `size` ranks.

    ring: bytes of each of its rings, `ring_bytes(size)` by default. The segment has no name and
    ends with the last process that holds it. Raises OSError.
    """
    descriptor = os.memfd_create("lockstep-lane")
    try:
        os.ftruncate(
            descriptor, torch.ops.lockstep_cpu.lane_segment_bytes(size, ring or ring_bytes(size))
        )
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class Lane:
    """One rank's end of a group. Not for two threads at once."""

    def __init__(
        self,
        rank: int,
        segments: Sequence[int],
        pids: Sequence[int],
        *,
        spin_s: float,
        ring: int | None = None,
    ) -> None:
        """Map the segments (file descriptors, by rank, still the caller's to close).

        pids: of the ranks' processes, whose end ends a wait for them. spin_s: seconds for which a
        wait looks before it sleeps. ring: as for `make_segment`. Raises OSError, RuntimeError.
        """
        self._lane = 0
        self.rank, self.size = rank, len(segments)
        processes: list[int] = []
        try:
            for other, pid in enumerate(pids):
                processes.append(-1 if other == rank else os.pidfd_open(pid))
            self._lane = torch.ops.lockstep_cpu.lane_open(
                rank,
                ring or ring_bytes(self.size),
                int(spin_s * 1e9),
                list(segments),
                processes,
            )
        except BaseException:
            for process in processes:
                if process >= 0:
                    os.close(process)
            raise

    def start(
        self,
        kind: int,
        send: torch.Tensor,
        send_at: list[int],
        send_bytes: list[int],
        into: torch.Tensor,
        recv_bytes: list[int],
    ) -> int:
        """Begin a collective; return its number. All sizes in bytes, one a rank.

        send_at: where in `send` the part for each rank begins. What the ranks send lies in `into`,
        one after the other. kind: what is called, the same on every rank. Both contiguous tensors
        must live, and `send` stay as it is, until `wait` returns. Raises RuntimeError.
        """
        return torch.ops.lockstep_cpu.lane_start(
            self._open(), kind, send, send_at, send_bytes, into, recv_bytes
        )

    def wait(self, number: int, timeout_s: float) -> None:
        """Return when collective `number` is complete on this rank.

        Raises RuntimeError after timeout_s, where a rank that is waited for has left or ended, and
        where the ranks call different collectives; the message names the rank.
        """
        torch.ops.lockstep_cpu.lane_wait(self._open(), number, int(timeout_s * 1e9))

    def close(self) -> None:
        """Leave the group, which the others are told; safe to call twice."""
        lane, self._lane = self._lane, 0
        if lane:
            torch.ops.lockstep_cpu.lane_close(lane)

    def _open(self) -> int:
        if not self._lane:
            raise RuntimeError("shared memory: this rank has left the group")
        return self._lane
