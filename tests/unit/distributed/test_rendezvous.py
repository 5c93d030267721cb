"""The check-in of ranks over a store that remembers: ranks are threads, the store is in memory.

python -m pytest tests/unit/distributed/test_rendezvous.py
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from engine.distributed.errors import RankError, RendezvousError
from engine.distributed.rendezvous import RankInfo, check_in


def present(rank: int, host: str = "a", error: str | None = None) -> RankInfo:
    return RankInfo(
        rank=rank, host=host, cores=[0], digest="d", gpu=None, no_gpu="none", error=error
    )


class Round:
    """The ranks of one start, each in a thread, and what each of them got."""

    def __init__(self, store: dist.Store, world: int, host: str, timeout_s: float = 20.0) -> None:
        self._store, self._world, self._host = store, world, host
        self._timeout = timedelta(seconds=timeout_s)
        self.results: dict[int, tuple[list[RankInfo], str]] = {}
        self.errors: dict[int, Exception] = {}
        self._threads: list[threading.Thread] = []

    def come(self, *ranks: int, error: str | None = None) -> None:
        for rank in ranks:
            thread = threading.Thread(target=self._one, args=(rank, error), daemon=True)
            thread.start()
            self._threads.append(thread)

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(30.0)
            assert not thread.is_alive()

    def _one(self, rank: int, error: str | None) -> None:
        own = present(rank, self._host, error)
        try:
            self.results[rank] = check_in(self._store, own, self._world, self._timeout)
        except (RankError, RendezvousError) as problem:
            self.errors[rank] = problem


def complete(store: dist.Store, world: int, host: str) -> str:
    """A start that nothing disturbs; the name of the run."""
    start = Round(store, world, host)
    start.come(*range(world))
    start.wait()
    assert sorted(start.results) == list(range(world))
    names = {name for _, name in start.results.values()}
    assert len(names) == 1
    for presences, _ in start.results.values():
        assert [(each.rank, each.host) for each in presences] == [(r, host) for r in range(world)]
    return names.pop()


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def test_a_world_of_one_meets_itself(store):
    complete(store, 1, "a")


def test_starts_over_one_store_have_names_of_their_own_with_fewer_and_with_more_ranks(store):
    names = [complete(store, world, f"host{n}") for n, world in enumerate((4, 3, 3, 5))]
    assert len(set(names)) == 4


@pytest.mark.parametrize("late", [0, 1])
def test_nobody_goes_on_with_what_an_earlier_run_has_left_of_a_rank_that_is_late(store, late):
    complete(store, 3, "old")
    again = Round(store, 3, "new")
    again.come(*({0, 1, 2} - {late}))
    time.sleep(0.3)
    assert not again.results and not again.errors, "they wait for the one that is late"
    again.come(late)
    again.wait()
    for presences, _ in again.results.values():
        assert [each.host for each in presences] == ["new"] * 3
    assert len(again.results) == 3


@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_only_came_to_an_earlier_run_is_named_as_missing(store, missing):
    complete(store, 3, "old")
    again = Round(store, 3, "new", timeout_s=0.5)
    again.come(*({0, 1, 2} - {missing}))
    again.wait()
    assert len(again.errors) == 2
    for error in again.errors.values():
        assert str(error).startswith(f"rank {missing} of 3 did not arrive within 0.5 s"), error


def test_an_error_of_one_rank_is_raised_by_all_and_not_again_by_the_next_run(store):
    first = Round(store, 2, "a")
    first.come(0)
    first.come(1, error="no such disk")
    first.wait()
    assert [str(first.errors[rank]) for rank in range(2)] == ["rank 1 on a: no such disk"] * 2
    complete(store, 2, "a")
