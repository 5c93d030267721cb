"""Small collectives, and a protocol for those that run asynchronously.

All-gathers go through one name that every supported torch version has; other collectives call
torch.distributed directly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from engine.distributed.groups import Group
from engine.profiling.phase_clock import Phase, PhaseClock

# torch 2.13 renamed all_gather_into_tensor to all_gather_single and warns about the old name.
_all_gather: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)

# The cost of one more small collective, as bytes that could be sent in the same time: 20
# microseconds at 12.5 GB/s, a node's share of a 100 Gbit/s link. Where the link is not measured.
COLLECTIVE_BYTES = 256 * 1024


def all_gather_rows(part: torch.Tensor, group: Group) -> torch.Tensor:
    """Return the rows of all ranks in rank order: [W * n, ...].

    part: [n, ...], the same n on every rank; returned itself in a group of one.

    Collective over `group`: every rank must call.
    """
    if group.size == 1:
        return part
    out = part.new_empty((group.size * part.shape[0], *part.shape[1:]))
    _all_gather(out, part.contiguous(), group=group.handle)
    return out


def start_all_gather(part: torch.Tensor, group: Group) -> Pending:
    """Start gathering contiguous parts [n, ...] of equal shape; the result is [W * n, ...], in rank
    order, the part itself in a group of one.

    Collective over `group`: every rank must call.
    """
    if group.size == 1:
        return Done(part)
    out = part.new_empty((group.size * part.shape[0], *part.shape[1:]))
    return Started(_all_gather(out, part, group=group.handle, async_op=True), out)


def broadcast_object(value: Any, group: Group) -> Any:
    """Return rank 0's value on every rank (pickled; for small host data).

    Collective over `group`: every rank must call.
    """
    if group.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=group.ranks[0], group=group.handle)
    return box[0]


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Return the values of all ranks, in rank order (pickled; for small host data).

    Collective over `group`: every rank must call.
    """
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    dist.all_gather_object(values, value, group=group.handle)
    return values


class Pending(Protocol):
    """A collective in flight."""

    def wait(self) -> torch.Tensor:
        """Wait for the result and return it; on CUDA the current stream waits, not the host."""
        ...


class Collectives(Protocol):
    """The two collectives that capacity agreement needs, with counters.

    Every rank calls the same ones in the same order. A group of one communicates and counts
    nothing.
    """

    rank: int  # of this process, within the group
    size: int
    bytes_sent: int  # by this rank to others; all_reduce counted as a ring
    num_collectives: int  # calls so far
    collective_bytes: float  # what could be sent in the time of one more small collective

    def all_gather(self, part: torch.Tensor) -> Pending:
        """Start gathering parts of equal shape; the result is [W, *part.shape]."""
        ...

    def all_reduce(self, part: torch.Tensor) -> Pending:
        """Start summing parts of equal shape, in place."""
        ...


class Done:
    """A `Pending` whose result is available from the start."""

    def __init__(self, result: torch.Tensor) -> None:
        self._result = result

    def wait(self) -> torch.Tensor:
        """Return the result."""
        return self._result


class Started:
    """A collective of torch.distributed in flight.

    work: its handle, None where it has completed.
    """

    def __init__(self, work: dist.Work | None, result: torch.Tensor) -> None:
        self._work, self._result = work, result

    def wait(self) -> torch.Tensor:
        """Wait for the result and return it; on CUDA the current stream waits, not the host."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


class GroupCollectives:
    """`Collectives` of a process group: NCCL on CUDA, shared memory or gloo on CPU."""

    def __init__(self, group: Group) -> None:
        self.rank, self.size = group.rank, group.size
        self.bytes_sent = 0
        self.num_collectives = 0
        self.collective_bytes = group.link.collective_bytes if group.link else COLLECTIVE_BYTES
        self._group = group

    def all_gather(self, part: torch.Tensor) -> Pending:
        """Start gathering parts of equal shape; the result is [W, *part.shape]. Collective."""
        if self.size == 1:
            return Done(part[None])
        out = part.new_empty((self.size, *part.shape))
        rows = out.view(-1, *part.shape[1:])
        work = _all_gather(rows, part.contiguous(), group=self._group.handle, async_op=True)
        self._count(part, self.size - 1)
        return Started(work, out)

    def all_reduce(self, part: torch.Tensor) -> Pending:
        """Start summing parts of equal shape, in place. Collective."""
        if self.size == 1:
            return Done(part)
        work = dist.all_reduce(part, group=self._group.handle, async_op=True)
        self._count(part, 2 * (self.size - 1) / self.size)
        return Started(work, part)

    def _count(self, part: torch.Tensor, times: float) -> None:
        self.bytes_sent += round(part.numel() * part.element_size() * times)
        self.num_collectives += 1


class Waitable(Protocol):
    """What is in flight until `wait` returns."""

    def wait(self) -> object:
        """Wait for it."""
        ...


_W = TypeVar("_W", bound=Waitable)


def run_overlapped(
    start: Callable[[], _W],
    work: Callable[[], None] | None,
    clock: PhaseClock,
    layer: int,
    *,
    phase: Phase | None,
) -> _W:
    """Start a collective, run `work` while it is in flight, and return it, ready to be waited for.

    Where `work` fails, the collective is waited for before the error is raised: one that is never
    waited for outlives its buffers.

    Args:
        start: starts the collective.
        work: None: nothing to overlap.
        clock: enters EXPERTS for the work, then `phase`, with the arrival at the start.
        layer: for the clock.
        phase: of the collective; None: `start` starts none.
    """
    if work is None:
        if phase is not None:
            clock.enter_collective(phase, layer)
        return start()
    arrival = None if phase is None else clock.record_arrival()
    pending = start()
    clock.enter(Phase.EXPERTS, layer)
    try:
        work()
    except Exception:
        with suppress(Exception):  # the first failure is the one to report
            pending.wait()
        raise
    if phase is None:
        clock.enter(Phase.PLAN, layer)
    else:
        clock.enter_collective(phase, layer, collective=arrival)
    return pending
