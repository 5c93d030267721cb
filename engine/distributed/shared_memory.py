"""A torch.distributed backend for ranks of one host that compute on the CPU: shared memory.

gloo sends through the host's network stack, where even an empty collective costs a good part of a
millisecond, and rows are copied at a fraction of the memory bandwidth. Here ranks write into ring
buffers that the others read: a shared-memory channel (`engine/ops/lane.py`). Callers use
torch.distributed, as they do with NCCL.

    channel = open_channel(store, rank, size)           on all ranks, or None on all of them
    handle = dist.new_group(ranks, backend=BACKEND, pg_options=channel)

Collectives must be called in the same order on every rank. Each message is checked for it, so a
rank that skips one makes the others fail at once and not after a timeout. all_reduce sums in rank
order, so every rank gets the same bits.
"""

from __future__ import annotations

import enum
import json
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.ops import lane as lane_op
from engine.ops.lane import Lane

BACKEND = "shared_memory"
_SPIN_S = 3e-4  # longer than a wake-up takes; 2 ms was tried and gained nothing


class Kind(enum.IntEnum):
    """The collective that a message belongs to; checked to be the same on every rank."""

    ALL_TO_ALL = 0
    ALL_GATHER = 1
    ALL_REDUCE = 2
    BROADCAST = 3
    BARRIER = 4


def open_channel(store: dist.Store, rank: int, size: int) -> Lane | None:
    """Return this rank's end of a shared-memory channel, or None on every rank.

    None where one rank cannot open it: ranks on several hosts, or in containers that do not see
    each other's processes; no compiled library; no memory.

    Collective over the ranks that share `store`, which must hold no keys of an earlier call.
    """
    segment, offer = _offer(size)
    try:
        offers = [json.loads(each) for each in _exchange(store, "offer", rank, size, offer)]
        if None in offers or len({each["host"] for each in offers}) > 1:
            return None
        channel = _connect(rank, offers)
        opened = _exchange(store, "opened", rank, size, channel is not None)
        if all(json.loads(each) for each in opened):
            return channel
        if channel is not None:
            channel.close()
        return None
    finally:
        if segment is not None:
            os.close(segment)


def _exchange(store: dist.Store, key: str, rank: int, size: int, value: Any) -> list[bytes]:
    """Return the values of all ranks, as JSON, in rank order."""
    store.set(f"{key}/{rank}", json.dumps(value))
    return [store.get(f"{key}/{other}") for other in range(size)]


def _offer(size: int) -> tuple[int | None, dict[str, Any] | None]:
    """Return this rank's segment and where others find it; (None, None) where there is none."""
    if not lane_op.available():
        return None, None
    try:
        # Ranks share memory only where they also share a network, so that namespaces that look like
        # several hosts count as several.
        spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "net", "uts")]
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            host = " ".join([socket.gethostname(), file.read().strip(), *spaces])
        segment = lane_op.make_segment(size)
    except OSError:
        return None, None
    return segment, {"host": host, "pid": os.getpid(), "segment": segment}


def _connect(rank: int, offers: Sequence[dict[str, Any]]) -> Lane | None:
    segments: list[int] = []
    # A spinning wait takes a core from a rank that has none of its own.
    spin_s = _SPIN_S if len(offers) <= len(os.sched_getaffinity(0)) else 0.0
    try:
        for offer in offers:
            segments.append(os.open(f"/proc/{offer['pid']}/fd/{offer['segment']}", os.O_RDWR))
        return Lane(rank, segments, [offer["pid"] for offer in offers], spin_s=spin_s)
    except (OSError, RuntimeError):
        return None
    finally:
        for segment in segments:
            os.close(segment)


class _Work(dist.Work):
    """A collective in flight.

    Args:
        kept: the tensors it reads and writes, referenced until it has completed.
        finish: called once it has completed.
    """

    def __init__(
        self, group: SharedMemoryGroup, number: int, kept: Any, finish: Callable[[], None] | None
    ) -> None:
        super().__init__()
        self._group, self._number, self._kept, self._finish = group, number, kept, finish

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for completion.

        Raises:
            RuntimeError: it cannot be completed.
        """
        if self._kept is not None:
            self._group.complete(self._number, timeout)
            if self._finish is not None:
                self._finish()
            self._kept = self._finish = None
        return True


class SharedMemoryGroup(dist.ProcessGroup):
    """The collectives that the engine calls, for tensors in host memory. Not thread-safe.

    Its methods have the names and arguments of torch's own process groups.
    """

    def __init__(self, channel: Lane, timeout: timedelta) -> None:
        super().__init__(channel.rank, channel.size)  # pyright: ignore[reportCallIssue]: no stub
        self._channel, self._timeout_s = channel, timeout.total_seconds()
        self._rank, self._size = channel.rank, channel.size

    # torch asks a group for its backend of the GPU that a run is bound to, and whether that can be
    # split; a group in Python is its own backend.
    supports_splitting = False

    def _get_backend(self, device: torch.device) -> SharedMemoryGroup:
        return self

    def getBackendName(self) -> str:
        """Return the name under which the backend is registered."""
        return BACKEND

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def rank(self) -> int:
        """Return this rank within the group."""
        return self._rank

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = None,
    ) -> dist.Work:
        """Send rows to every rank; without splits the same number to each."""
        row = input[0].nbytes if input.shape[0] else output[0].nbytes if output.shape[0] else 0
        send = [row * n for n in input_splits or self._even(input)]
        recv = [row * n for n in output_splits or self._even(output)]
        at, end = [], 0
        for part in send:
            at.append(end)
            end += part
        return self._start(Kind.ALL_TO_ALL, input, at, send, output, recv)

    def all_gather_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: Any = None
    ) -> dist.Work:
        """Gather every rank's `input` in rank order."""
        return self._gather(Kind.ALL_GATHER, input, output)

    def allgather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> dist.Work:
        """Gather every rank's tensor into a list."""
        (parts,), (own,) = outputs, inputs
        into = own.new_empty((self._size, *own.shape))

        def spread() -> None:
            for part, row in zip(parts, into, strict=True):
                part.copy_(row.view_as(part))

        return self._gather(Kind.ALL_GATHER, own, into, spread)

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        """Sum in place, in rank order."""
        (own,) = tensors
        if opts is not None and opts.reduceOp != dist.ReduceOp.SUM:
            raise NotImplementedError(f"{BACKEND}: all_reduce adds, and {opts.reduceOp} is not it")
        into = own.new_empty((self._size, *own.shape))

        def add() -> None:
            total = into[0]
            for part in into[1:]:
                total += part
            own.copy_(total)

        return self._gather(Kind.ALL_REDUCE, own, into, add)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> dist.Work:
        """Copy the root's tensor to every rank."""
        (own,) = tensors
        root, none = opts.rootRank, [0] * self._size
        send, recv = list(none), list(none)
        if self._rank == root:
            send = [own.nbytes] * self._size
            send[root] = 0
        else:
            recv[root] = own.nbytes
        return self._start(Kind.BROADCAST, own, none, send, own, recv)

    def barrier(self, opts: Any = None) -> dist.Work:
        """Wait until every rank has reached the barrier."""
        none = [0] * self._size
        empty = torch.empty(0)
        work = self._start(Kind.BARRIER, empty, none, none, empty, none)
        work.wait()
        return work

    def complete(self, number: int, timeout: timedelta | None) -> None:
        """Wait for collective `number`; its errors carry the backend's name."""
        timeout_s = self._timeout_s if timeout is None else timeout.total_seconds()
        try:
            self._channel.wait(number, timeout_s or self._timeout_s)
        except RuntimeError as error:
            raise RuntimeError(f"[{BACKEND}] rank {self._rank}: {error}") from None

    def shutdown(self) -> None:
        """Leave the group; ranks that wait for this one fail."""
        self._channel.close()

    abort = shutdown

    # Their names before torch 2.13.
    alltoall_base = all_to_all_single  # pyright: ignore[reportAssignmentType]: names differ
    _allgather_base = all_gather_single

    def _even(self, tensor: torch.Tensor) -> list[int]:
        rows, rest = divmod(tensor.shape[0], self._size)
        if rest:
            raise ValueError(
                f"{BACKEND}: {tensor.shape[0]} rows without splits: must be a multiple of the "
                f"{self._size} ranks"
            )
        return [rows] * self._size

    def _gather(
        self,
        kind: Kind,
        own: torch.Tensor,
        into: torch.Tensor,
        finish: Callable[[], None] | None = None,
    ) -> dist.Work:
        each = [own.nbytes] * self._size
        return self._start(kind, own, [0] * self._size, each, into, each, finish)

    def _start(
        self,
        kind: Kind,
        send: torch.Tensor,
        send_at: list[int],
        send_bytes: list[int],
        into: torch.Tensor,
        recv_bytes: list[int],
        finish: Callable[[], None] | None = None,
    ) -> dist.Work:
        own = send.contiguous()
        try:
            number = self._channel.start(int(kind), own, send_at, send_bytes, into, recv_bytes)
        except RuntimeError as error:
            raise RuntimeError(f"[{BACKEND}] rank {self._rank}: {error}") from None
        return _Work(self, number, (own, into), finish)


def _create(opts: Any, channel: Lane | None) -> SharedMemoryGroup:
    if channel is None:
        raise ValueError(f"backend {BACKEND}: pass the result of open_channel as pg_options")
    return SharedMemoryGroup(channel, opts.timeout)


if BACKEND not in dist.Backend.backend_list:
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])
