"""The queue of dealt lines: own lines in order first, then those of the rank with the most left.

Run: pytest tests/unit/batch/test_dealt_queue.py
"""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from engine.batch.dealt_queue import DealtQueue
from engine.batch.input.pending import Line
from engine.request import Completion, Request


class Numbers:
    """Lines 0 to n - 1."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, queue_index: int) -> Line:
        return Line(queue_index, queue_index + 1, b"")


def parse(line: Line) -> Request | Completion:
    return Request(index=line.index, id="x", prompt_token_ids=[1])


def queues(bounds: list[int], store: dist.Store | None = None) -> list[DealtQueue]:
    store = store or dist.HashStore()
    return [
        DealtQueue(Numbers(bounds[-1]), parse, store, "queue", bounds, rank)
        for rank in range(len(bounds) - 1)
    ]


def drain(queue: DealtQueue, count: int = 1 << 30) -> list[int]:
    taken: list[int] = []
    while len(taken) < count and (item := queue.take()) is not None:
        assert item.index is not None
        taken.append(item.index)
    return taken


def test_each_rank_takes_its_own_lines_in_order():
    first, second = queues([0, 5, 9])
    assert drain(first, 5) == [0, 1, 2, 3, 4]
    assert drain(second, 4) == [5, 6, 7, 8]
    assert first.take() is None and second.take() is None
    assert first.is_exhausted() and second.is_exhausted()


def test_a_rank_whose_lines_are_taken_takes_runs_of_the_rank_with_most_left():
    helper, some, most = queues([0, 0, 40, 140])
    # 100 // 12 of the last rank's lines at once.
    assert drain(helper, 8) == list(range(40, 48))
    assert drain(most, 1) == [48] and drain(some, 1) == [0]
    rest = drain(helper)
    assert sorted([*range(40, 49), 0, *rest]) == list(range(140))
    assert some.take() is None and most.take() is None


def test_a_rank_that_has_taken_a_run_is_exhausted_when_it_has_begun_all_of_it():
    helper, owner = queues([0, 0, 16])
    assert drain(helper, 1) == [0]
    drain(owner)
    assert owner.is_exhausted() and not helper.is_exhausted()
    assert drain(helper) == [1] and helper.is_exhausted()


def test_asking_whether_lines_are_left_takes_none():
    first, second = queues([0, 2, 4])
    assert not any(queue.is_exhausted() for queue in (first, second) for _ in range(3))
    assert sorted(drain(first)) == [0, 1, 2, 3]


@pytest.mark.parametrize("bounds, limits", [([0, 5, 9], [5, 5]), ([0, 1, 9], [5, 8]), ([0], [])])
def test_the_limit_is_the_rank_s_own_lines_and_at_least_a_fair_share(bounds, limits):
    assert [queue.limit for queue in queues(bounds)] == limits


@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    turns=st.lists(st.integers(0, 4), max_size=80),
)
def test_every_line_is_taken_once_in_any_order_of_ranks(counts, turns):
    bounds = [sum(counts[:rank]) for rank in range(len(counts) + 1)]
    ranks = queues(bounds)
    taken = [index for turn in turns for index in drain(ranks[turn % len(ranks)], 1)]
    for queue in ranks:
        taken += drain(queue)
        assert queue.is_exhausted()
    assert sorted(taken) == list(range(bounds[-1]))


def test_ranks_that_take_at_once_share_every_line_exactly_once():
    server = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=30))
    taken: list[list[int]] = [[] for _ in range(4)]

    def pull(rank: int) -> None:
        store = dist.TCPStore("localhost", server.port, timeout=timedelta(seconds=30))
        taken[rank] = drain(queues([0, 10, 30, 190, 200], store)[rank])

    threads = [threading.Thread(target=pull, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(index for share in taken for index in share) == list(range(200))
