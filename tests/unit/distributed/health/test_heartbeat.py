"""Beacons over a real store in this process: beats, verdicts, and a store that goes away.

Run: pytest tests/unit/distributed/health/test_heartbeat.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from engine.distributed.health.heartbeat import HeartbeatPublisher
from engine.distributed.health.peer_monitor import Heartbeat
from engine.distributed.health.progress import Progress

PLACE = Progress(step=4, layer=2, phase="experts", collective=31)


class Server:
    """A store and the beacons that talk to it."""

    def __init__(self) -> None:
        self.store: Any = dist.TCPStore(
            "127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False
        )
        self.beacons: list[HeartbeatPublisher] = []

    def beacon(self, rank: int, world_size: int = 2, period_s: float = 0.02) -> HeartbeatPublisher:
        count = 0

        def current() -> Heartbeat:
            nonlocal count
            count += 1
            return Heartbeat(count, "running", PLACE, f"rank {rank}")

        client = dist.TCPStore("127.0.0.1", self.store.port, None, False, timedelta(seconds=30))
        beacon = HeartbeatPublisher(
            dist.PrefixStore("run", client), rank, world_size, period_s, current
        )
        beacon.start()
        self.beacons.append(beacon)
        return beacon


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    for beacon in made.beacons:
        beacon.close(5)


def await_true(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 10
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return value


def test_every_rank_hears_all_beats_with_place_and_text(server):
    first, second = server.beacon(0), server.beacon(1)
    for beacon in (first, second):
        heard = await_true(lambda: (beats := beacon.take()) and None not in beats and beats)  # noqa: B023
        assert [beat.text for beat in heard] == ["rank 0", "rank 1"]
        assert all(beat.place == PLACE and beat.state == "running" for beat in heard)


def test_a_rank_that_never_came_holds_nobody_up(server):
    beacon = server.beacon(0, world_size=3)
    assert beacon.flush(10)
    beats = beacon.take()
    assert beats is not None and beats[0] is not None and beats[1:] == [None, None]


def test_what_was_taken_is_not_news_again(server):
    beacon = server.beacon(0, period_s=60)
    assert beacon.flush(10)
    assert beacon.take() is not None
    assert beacon.take() is None


def test_flush_publishes_at_once_what_is_true_when_it_is_called(server):
    slow, reader = server.beacon(0, period_s=60), server.beacon(1, period_s=60)
    assert slow.flush(10) and slow.flush(10) and reader.flush(10)
    beats = reader.take()
    assert beats is not None and beats[0] is not None and beats[0].count >= 2


def test_of_two_verdicts_all_adopt_the_first(server):
    first, second, third = (server.beacon(rank, world_size=3) for rank in range(3))
    assert first.propose("it was rank 2", 10) == "it was rank 2"
    assert second.propose("it was rank 0", 10) == "it was rank 2"
    assert await_true(lambda: third.verdict) == "it was rank 2"


def test_a_store_that_is_gone_is_noticed_and_nobody_waits_for_it(server):
    beacon = server.beacon(0)
    assert beacon.flush(10)
    server.store = None  # closes the server
    await_true(lambda: beacon.broken)
    began = time.monotonic()
    assert not beacon.flush(10) and beacon.propose("it was rank 2", 10) is None
    assert time.monotonic() - began < 5
