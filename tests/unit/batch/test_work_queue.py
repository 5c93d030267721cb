"""The work queue: ranks share every line, each exactly once."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from engine.batch.input.pending import Line
from engine.batch.work_queue import WorkQueue
from engine.request import Completion, Request, RequestError

BAD_LINE = RequestError("invalid_json", "bad line")


class Numbers:
    """Lines 0 to n - 1."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, queue_index: int) -> Line:
        return Line(queue_index, queue_index + 1, b"")


def parse(line: Line) -> Request | Completion:
    if line.index % 5 == 4:
        return Completion.failure(line.index, "bad", BAD_LINE, line=line.number)
    return Request(index=line.index, id="x", prompt_token_ids=[1])


def test_eight_requests_on_two_ranks_go_four_and_four():
    queue = WorkQueue(Numbers(8), parse, dist.HashStore(), "queue", num_data=2)
    assert queue.limit == 4


@pytest.mark.parametrize("count, num_data, limit", [(0, 2, 1), (1, 4, 1), (9, 2, 5), (9, 9, 1)])
def test_the_limit_is_a_fair_share_and_at_least_one(count, num_data, limit):
    queue = WorkQueue(Numbers(count), parse, dist.HashStore(), "queue", num_data)
    assert queue.limit == limit


def test_an_exhausted_queue_does_not_use_the_store_again():
    store = dist.HashStore()
    queue = WorkQueue(Numbers(1), parse, store, "queue", 1)
    assert isinstance(queue.take(), Request)
    assert [queue.take() for _ in range(5)] == [None] * 5
    assert store.add("queue", 0) == 2


def test_ranks_that_take_at_once_share_every_line_exactly_once():
    server = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=30))
    taken: list[list[int]] = [[] for _ in range(4)]

    def pull(place: int) -> None:
        store = dist.TCPStore("localhost", server.port, timeout=timedelta(seconds=30))
        queue = WorkQueue(Numbers(200), parse, store, "queue", 4)
        while (item := queue.take()) is not None:
            taken[place].append(item.index)

    threads = [threading.Thread(target=pull, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(index for share in taken for index in share) == list(range(200))
