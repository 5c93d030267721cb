"""Publishers over a real store in this process: heartbeats, diagnoses, and a store that is lost.

Run: pytest tests/unit/distributed/health/test_heartbeat.py
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from engine.distributed.health.heartbeat import HeartbeatPublisher
from engine.distributed.health.peer_monitor import Heartbeat
from engine.distributed.health.progress import Progress
from tests.helpers.polling import await_true

PROGRESS = Progress(step=4, layer=2, phase="experts", collective=31)


class Server:
    """A store and the publishers connected to it."""

    def __init__(self) -> None:
        self.store: Any = dist.TCPStore(
            "127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False
        )
        self.publishers: list[HeartbeatPublisher] = []

    def publisher(
        self, rank: int, world_size: int = 2, period_s: float = 0.02
    ) -> HeartbeatPublisher:
        count = 0

        def current() -> Heartbeat:
            nonlocal count
            count += 1
            return Heartbeat(count, "running", PROGRESS, f"rank {rank}")

        client = dist.TCPStore("127.0.0.1", self.store.port, None, False, timedelta(seconds=30))
        publisher = HeartbeatPublisher(
            dist.PrefixStore("run", client), rank, world_size, period_s, current
        )
        publisher.start()
        self.publishers.append(publisher)
        return publisher


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    for publisher in made.publishers:
        publisher.close(5)


def test_every_rank_receives_all_heartbeats_with_progress_and_error(server):
    first, second = server.publisher(0), server.publisher(1)
    for publisher in (first, second):
        latest = await_true(lambda: (found := publisher.poll()) and None not in found and found)  # noqa: B023
        assert [each.error for each in latest] == ["rank 0", "rank 1"]
        assert all(each.progress == PROGRESS and each.state == "running" for each in latest)


def test_a_rank_that_never_published_blocks_no_other(server):
    publisher = server.publisher(0, world_size=3)
    assert publisher.flush(10)
    latest = publisher.poll()
    assert latest is not None and latest[0] is not None and latest[1:] == [None, None]


def test_a_heartbeat_is_returned_by_one_poll_only(server):
    publisher = server.publisher(0, period_s=60)
    assert publisher.flush(10)
    assert publisher.poll() is not None
    assert publisher.poll() is None


def test_flush_publishes_at_once_the_state_at_its_call(server):
    slow, reader = server.publisher(0, period_s=60), server.publisher(1, period_s=60)
    assert slow.flush(10) and slow.flush(10) and reader.flush(10)
    latest = reader.poll()
    assert latest is not None and latest[0] is not None and latest[0].count >= 2


def test_of_two_diagnoses_all_accept_the_first(server):
    first, second, third = (server.publisher(rank, world_size=3) for rank in range(3))
    assert first.propose("it was rank 2", 10) == "it was rank 2"
    assert second.propose("it was rank 0", 10) == "it was rank 2"
    assert await_true(lambda: third.diagnosis) == "it was rank 2"


def test_a_lost_store_is_detected_and_not_waited_for(server):
    publisher = server.publisher(0)
    assert publisher.flush(10)
    server.store = None  # closes the server
    await_true(lambda: publisher.disconnected)
    # One that waits for the store is ended by the limit on a test, before these are over.
    assert not publisher.flush(3600) and publisher.propose("it was rank 2", 3600) is None
