"""Small collectives under names that hold across torch versions; everything else calls
torch.distributed itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
import torch.distributed as dist

from engine.distributed.groups import Group

# torch 2.13 renamed all_gather_into_tensor to all_gather_single and warns about the old name.
_all_gather: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)


def all_gather_rows(part: torch.Tensor, group: Group) -> torch.Tensor:
    """Stack every rank's rows: part [n, ...] gives [W * n, ...] in rank order, the same n
    everywhere.

    Collective over `group`: every rank must call. A group of one returns `part` itself.
    """
    if group.size == 1:
        return part
    out = part.new_empty((group.size * part.shape[0], *part.shape[1:]))
    _all_gather(out, part.contiguous(), group=group.handle)
    return out


def broadcast_object(value: Any, group: Group) -> Any:
    """Return rank 0's value on every rank (pickled, small host data). Collective over `group`."""
    if group.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=group.ranks[0], group=group.handle)
    return box[0]


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Return every rank's value on every rank, in rank order (pickled; for small host data).
    Collective over `group`.
    """
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    dist.all_gather_object(values, value, group=group.handle)
    return values


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> torch.Tensor:
        """Return its result once it is there; on CUDA the current stream waits, not the host."""
        ...


class Collectives(Protocol):
    """The two collectives that agreement needs, counted; every rank calls the same in one order.

    rank, size: this rank's place in the group. bytes_sent: what this rank handed to other ranks, by
    the ring algorithm's count for all_reduce. num_collectives: calls so far. A group of one calls
    nothing and counts nothing.
    """

    rank: int
    size: int
    bytes_sent: int
    num_collectives: int

    def all_gather(self, part: torch.Tensor) -> Pending:
        """Start gathering parts of equal shape: [W, *part.shape]."""
        ...

    def all_reduce(self, part: torch.Tensor) -> Pending:
        """Start adding parts of equal shape up, in place."""
        ...


class Done:
    """A `Pending` whose result was there from the start."""

    def __init__(self, result: torch.Tensor) -> None:
        self._result = result

    def wait(self) -> torch.Tensor:
        """Return the result."""
        return self._result


class Started:
    """A collective of torch.distributed under way. work: its handle."""

    def __init__(self, work: dist.Work | None, result: torch.Tensor) -> None:
        self._work, self._result = work, result

    def wait(self) -> torch.Tensor:
        """Wait, on CUDA on the current stream alone, and return the result."""
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
        self._group = group

    def all_gather(self, part: torch.Tensor) -> Pending:
        """Start gathering parts of equal shape: [W, *part.shape]. Collective."""
        if self.size == 1:
            return Done(part[None])
        out = part.new_empty((self.size, *part.shape))
        work = _all_gather(
            out.view(-1, *part.shape[1:]),
            part.contiguous(),
            group=self._group.handle,
            async_op=True,
        )
        self._count(part, self.size - 1)
        return Started(work, out)

    def all_reduce(self, part: torch.Tensor) -> Pending:
        """Start adding parts of equal shape up, in place. Collective."""
        if self.size == 1:
            return Done(part)
        work = dist.all_reduce(part, group=self._group.handle, async_op=True)
        self._count(part, 2 * (self.size - 1) / self.size)
        return Started(work, part)

    def _count(self, part: torch.Tensor, times: float) -> None:
        self.bytes_sent += round(part.numel() * part.element_size() * times)
        self.num_collectives += 1


# What one more small collective costs, as bytes that could travel meanwhile: 20 microseconds at
# 12.5 GB/s, a node's share of a 100 Gbit/s link. Within a node both are faster by the same order.
COLLECTIVE_BYTES = 256 * 1024


def run_overlapped(work: Callable[[], None], wait: Callable[[], object]) -> None:
    """Run `work`; where it fails, `wait` for the collective before its error goes on.

    A collective nobody waits for outlives its buffers. What went wrong first is what to tell, also
    where the others are gone by now.
    """
    try:
        work()
    except Exception:
        with suppress(Exception):
            wait()
        raise
