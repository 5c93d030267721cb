"""The rendezvous over a store with keys of earlier runs: ranks are threads, the store in memory.

python -m pytest tests/unit/distributed/test_rendezvous.py
"""

from __future__ import annotations

import json
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from engine.distributed.errors import RankError, RendezvousError
from engine.distributed.rendezvous import RankInfo, join
from tests.helpers.polling import await_true


def rank_info(rank: int, host: str = "a", error: str | None = None) -> RankInfo:
    return RankInfo(
        rank=rank, host=host, cores=[0], digest="d", gpu=None, no_gpu="none", error=error
    )


class Start:
    """The ranks of one start, each in a thread, and the result of each."""

    def __init__(self, store: dist.Store, world: int, host: str, timeout_s: float = 20.0) -> None:
        self._store, self._world, self._host = store, world, host
        self._timeout = timedelta(seconds=timeout_s)
        self.results: dict[int, tuple[list[RankInfo], str]] = {}
        self.errors: dict[int, Exception] = {}
        self._threads: list[threading.Thread] = []

    def add(self, *ranks: int, error: str | None = None) -> None:
        for rank in ranks:
            thread = threading.Thread(target=self._one, args=(rank, error), daemon=True)
            thread.start()
            self._threads.append(thread)

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(30.0)
            assert not thread.is_alive()

    def _one(self, rank: int, error: str | None) -> None:
        own = rank_info(rank, self._host, error)
        try:
            self.results[rank] = join(self._store, own, self._world, self._timeout)
        except (RankError, RendezvousError) as problem:
            self.errors[rank] = problem


def complete(store: dist.Store, world: int, host: str) -> str:
    """Run a start without faults; return the name of the run."""
    start = Start(store, world, host)
    start.add(*range(world))
    start.wait()
    assert sorted(start.results) == list(range(world))
    names = {name for _, name in start.results.values()}
    assert len(names) == 1
    for infos, _ in start.results.values():
        assert [(each.rank, each.host) for each in infos] == [(r, host) for r in range(world)]
    return names.pop()


class CountingStore(dist.HashStore):
    """Counts the checks for keys: rank 0 makes two or more of them each time it polls."""

    num_checks = 0

    def check(self, *args) -> bool:
        self.num_checks += 1
        return super().check(*args)


@pytest.fixture
def store() -> CountingStore:
    return CountingStore()


def host_of(store: dist.Store, rank: int) -> str:
    """Return the host in the info that a rank has published."""
    return json.loads(store.get(f"info/{rank}"))["info"]["host"]


def test_a_world_of_one_joins_without_an_error(store):
    complete(store, 1, "a")


def test_starts_over_one_store_have_names_of_their_own_with_fewer_and_with_more_ranks(store):
    names = [complete(store, world, f"host{n}") for n, world in enumerate((4, 3, 3, 5))]
    assert len(set(names)) == 4


@pytest.mark.parametrize("late", [0, 1])
def test_the_info_of_an_earlier_run_is_not_taken_for_a_late_ranks(store, late):
    complete(store, 3, "old")
    again = Start(store, 3, "new")
    early = {0, 1, 2} - {late}
    again.add(*early)
    await_true(lambda: all(host_of(store, rank) == "new" for rank in early))
    if 0 in early:
        num_checks = store.num_checks
        await_true(lambda: store.num_checks >= num_checks + 20)
    assert not again.results and not again.errors, "they wait for the late rank"
    again.add(late)
    again.wait()
    for infos, _ in again.results.values():
        assert [each.host for each in infos] == ["new"] * 3
    assert len(again.results) == 3


@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_only_joined_an_earlier_run_is_named_as_missing(store, missing):
    complete(store, 3, "old")
    again = Start(store, 3, "new", timeout_s=0.5)
    again.add(*({0, 1, 2} - {missing}))
    again.wait()
    assert len(again.errors) == 2
    for error in again.errors.values():
        assert str(error).startswith(f"rank {missing} of 3 did not join within 0.5 s"), error


def test_an_error_of_one_rank_is_raised_by_all_and_not_again_by_the_next_run(store):
    first = Start(store, 2, "a")
    first.add(0)
    first.add(1, error="no such disk")
    first.wait()
    assert [str(first.errors[rank]) for rank in range(2)] == ["rank 1 on a: no such disk"] * 2
    complete(store, 2, "a")
