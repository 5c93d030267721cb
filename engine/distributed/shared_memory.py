"""A torch.distributed backend for ranks of one host that compute on the CPU: shared memory.

gloo sends through the host's network stack, where even an empty collective costs a good part of a
millisecond and rows move at a fraction of what memory gives. Here ranks write into rings that the
others read (`engine/ops/lane.py`). Everything above still calls torch.distributed, as it does for
NCCL.

    lane = open_lane(store, rank, size)                 all ranks, or None on all of them
    handle = dist.new_group(ranks, backend=BACKEND, pg_options=lane)

Collectives must be called in the same order on every rank, which each message is checked for: a
rank that skips one makes the others fail at once and not after a timeout. all_reduce adds in the
order of the ranks, so every rank gets the same bits.
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
_SPIN_S = 3e-4  # longer than a wake-up takes; a wait of 2 ms was tried and gained nothing


class Kind(enum.IntEnum):
    """What is called; ranks that differ in it are told apart."""

    ALL_TO_ALL = 0
    ALL_GATHER = 1
    ALL_REDUCE = 2
    BROADCAST = 3
    BARRIER = 4


def open_lane(store: dist.Store, rank: int, size: int) -> Lane | None:
    """This rank's end of a group in shared memory; None on every rank where one of them cannot:
    ranks on several hosts or in containers that do not see each other's processes, no compiled
    library, no memory.

    Collective over the ranks that share `store`, which must hold nothing of an earlier call.
    """
    segment, offer = _offer(size)
    try:
        offers = [json.loads(each) for each in _tell_all(store, "offer", rank, size, offer)]
        if None in offers or len({each["place"] for each in offers}) > 1:
            return None
        lane = _connect(rank, offers)
        opened = _tell_all(store, "opened", rank, size, lane is not None)
        if all(json.loads(each) for each in opened):
            return lane
        if lane is not None:
            lane.close()
        return None
    finally:
        if segment is not None:
            os.close(segment)


def _tell_all(store: dist.Store, key: str, rank: int, size: int, value: Any) -> list[bytes]:
    store.set(f"{key}/{rank}", json.dumps(value))
    return [store.get(f"{key}/{other}") for other in range(size)]


def _offer(size: int) -> tuple[int | None, dict[str, Any] | None]:
    """This rank's segment, and where others find it; (None, None) where there is none."""
    if not lane_op.available():
        return None, None
    try:
        # Ranks share memory where they also share a network: what looks like two hosts is two.
        spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "net", "uts")]
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            place = " ".join([socket.gethostname(), file.read().strip(), *spaces])
        segment = lane_op.make_segment(size)
    except OSError:
        return None, None
    return segment, {"place": place, "pid": os.getpid(), "segment": segment}


def _connect(rank: int, offers: Sequence[dict[str, Any]]) -> Lane | None:
    segments: list[int] = []
    # A wait that looks instead of sleeping takes a core from a rank that has none of its own.
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
    """A collective under way. kept: the tensors it reads and writes."""

    def __init__(
        self, group: SharedMemoryGroup, number: int, kept: Any, finish: Callable[[], None] | None
    ) -> None:
        super().__init__()
        self._group, self._number, self._kept, self._finish = group, number, kept, finish

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait. Raises RuntimeError where it cannot be completed."""
        if self._kept is not None:
            self._group.complete(self._number, timeout)
            if self._finish is not None:
                self._finish()
            self._kept = self._finish = None
        return True


class SharedMemoryGroup(dist.ProcessGroup):
    """The collectives that the engine calls, for tensors in host memory. Not for two threads at
    once.

    Its methods have the names and arguments of torch's own process groups.
    """

    def __init__(self, lane: Lane, timeout: timedelta) -> None:
        super().__init__(lane.rank, lane.size)  # pyright: ignore[reportCallIssue]: not in its stub
        self._lane, self._timeout_s = lane, timeout.total_seconds()
        self._rank, self._size = lane.rank, lane.size

    def getBackendName(self) -> str:
        """As torch asks."""
        return BACKEND

    def size(self) -> int:
        """Ranks."""
        return self._size

    def rank(self) -> int:
        """This rank's place."""
        return self._rank

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = None,
    ) -> dist.Work:
        """Rows to every rank; without splits the same number to each."""
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
        """Every rank's `input`, one after the other."""
        return self._gather(Kind.ALL_GATHER, input, output)

    def allgather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> dist.Work:
        """Every rank's tensor into a list."""
        (parts,), (own,) = outputs, inputs
        into = own.new_empty((self._size, *own.shape))

        def spread() -> None:
            for part, row in zip(parts, into, strict=True):
                part.copy_(row.view_as(part))

        return self._gather(Kind.ALL_GATHER, own, into, spread)

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        """Add up in place, in the order of the ranks."""
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
        """The root's tensor on every rank."""
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
        """Wait for every rank."""
        none = [0] * self._size
        empty = torch.empty(0)
        work = self._start(Kind.BARRIER, empty, none, none, empty, none)
        work.wait()
        return work

    def complete(self, number: int, timeout: timedelta | None) -> None:
        """Wait for collective `number`; what goes wrong is told with the backend's name."""
        timeout_s = self._timeout_s if timeout is None else timeout.total_seconds()
        try:
            self._lane.wait(number, timeout_s or self._timeout_s)
        except RuntimeError as error:
            raise RuntimeError(f"[{BACKEND}] rank {self._rank}: {error}") from None

    def shutdown(self) -> None:
        """Leave the group: who waits for this rank is told."""
        self._lane.close()

    def abort(self) -> None:
        """Leave the group."""
        self._lane.close()

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
            number = self._lane.start(int(kind), own, send_at, send_bytes, into, recv_bytes)
        except RuntimeError as error:
            raise RuntimeError(f"[{BACKEND}] rank {self._rank}: {error}") from None
        return _Work(self, number, (own, into), finish)


def _create(opts: Any, lane: Lane | None) -> SharedMemoryGroup:
    if lane is None:
        raise ValueError(f"backend {BACKEND}: give an open Lane as pg_options")
    return SharedMemoryGroup(lane, opts.timeout)


if BACKEND not in dist.Backend.backend_list:
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])
