"""Ranks as threads of one process: collectives without sockets, for thousands of small cases.

`run_threads(fn, world)` calls `fn(collectives)` on every rank and returns the results in rank
order. One rank computes at a time, the others wait for a lock or in a collective: threads that
compete for the interpreter's lock take 1.5 times as long. A rank that fails breaks the barrier, so
the others fail too instead of waiting for it; the first real failure is raised.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from engine.distributed.collectives import COLLECTIVE_BYTES, Done, Pending


class ThreadCollectives:
    """`engine.distributed.collectives.Collectives` over a barrier and a shared list."""

    def __init__(
        self,
        rank: int,
        size: int,
        barrier: threading.Barrier,
        box: list,
        lock: threading.Lock | None = None,
    ) -> None:
        self.rank, self.size = rank, size
        self.bytes_sent = self.num_collectives = 0
        self.collective_bytes: float = COLLECTIVE_BYTES
        # The calls in order, with their shapes: the same on every rank.
        self.log: list[tuple[str, torch.Size]] = []
        self._barrier, self._box = barrier, box
        self._lock = lock or threading.Lock()
        if lock is None:
            self._lock.acquire()

    def all_gather(self, part: torch.Tensor) -> Pending:
        """Gather parts of equal shape; the result is [W, *part.shape]."""
        return Done(torch.stack(self._exchange("all_gather", part)))

    def all_reduce(self, part: torch.Tensor) -> Pending:
        """Sum over ranks."""
        return Done(torch.stack(self._exchange("all_reduce", part)).sum(0).to(part.dtype))

    def _exchange(self, name: str, part: torch.Tensor) -> list[torch.Tensor]:
        self.log.append((name, part.shape))
        self.num_collectives += 1
        self.bytes_sent += part.numel() * part.element_size()
        self._box[self.rank] = (name, part.clone())
        self._lock.release()
        try:
            self._barrier.wait(20)
            parts = list(self._box)
            self._barrier.wait(20)
        finally:
            self._lock.acquire()
        assert {other for other, _ in parts} == {name}, "ranks call different collectives"
        assert len({tensor.shape for _, tensor in parts}) == 1, "ranks send different shapes"
        return [tensor for _, tensor in parts]


def run_threads(fn: Callable[[ThreadCollectives], Any], world: int) -> list[Any]:
    """Call `fn` on `world` ranks at once; return the results in rank order."""
    barrier, box, lock = threading.Barrier(world), [None] * world, threading.Lock()
    results: list[Any] = [None] * world
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            with lock:
                results[rank] = fn(ThreadCollectives(rank, world, barrier, box, lock))
        except threading.BrokenBarrierError:
            pass
        except BaseException as failure:
            failures.append(failure)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(1, world)]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    if barrier.broken:
        raise TimeoutError("a rank did not reach a collective")
    return results
