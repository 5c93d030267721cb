"""The ages of heartbeats and progress that a rank observes, on a simulated clock.

Run: pytest tests/unit/distributed/health/test_peer_monitor.py
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.distributed.health.peer_monitor import Heartbeat, PeerMonitor
from engine.distributed.health.progress import Progress

PERIOD = 0.25
HOSTS = ("h0", "h0", "h1")


class Observer:
    """Rank 0, which reads every rank's heartbeat once per PERIOD; counts for them."""

    def __init__(self) -> None:
        self.now = 100.0
        self.counts = [0, 0, 0]
        self.monitor = PeerMonitor(0, HOSTS, PERIOD, self.now)

    def observe(
        self,
        seconds: float,
        dead: Sequence[int] = (),
        progress: Progress | None = None,
        store: bool = True,
    ) -> None:
        """Let time pass, in which all ranks but those in `dead` publish heartbeats."""
        for _ in range(round(seconds / PERIOD)):
            self.now += PERIOD
            for rank in range(3):
                self.counts[rank] += rank not in dead
            self.monitor.update(self.now, self.heartbeats(progress) if store else None)

    def heartbeats(self, progress: Progress | None = None) -> list[Heartbeat | None]:
        return [Heartbeat(count, "running", progress or Progress()) for count in self.counts]

    def pause(self, seconds: float) -> None:
        """Do not run at all."""
        self.now += seconds

    def heartbeat_age_s(self, rank: int) -> float:
        return self.monitor.peers()[rank].heartbeat_age_s


def test_the_heartbeat_age_counts_from_the_last_new_heartbeat():
    observer = Observer()
    observer.observe(2.0)
    observer.observe(3.0, dead=[2])
    assert observer.heartbeat_age_s(2) == pytest.approx(3.0)
    assert observer.heartbeat_age_s(0) == observer.heartbeat_age_s(1) == 0.0
    observer.observe(PERIOD)
    assert observer.heartbeat_age_s(2) == 0.0


def test_a_rank_that_never_published_ages_from_the_start_and_is_starting():
    observer = Observer()
    for _ in range(8):
        observer.now += PERIOD
        observer.counts[0] += 1
        observer.monitor.update(observer.now, [Heartbeat(observer.counts[0]), None, None])
    peer = observer.monitor.peers()[2]
    assert (peer.host, peer.state) == ("h1", "starting")
    assert peer.heartbeat_age_s == pytest.approx(2.0)


def test_the_progress_age_counts_from_the_last_change_while_heartbeats_go_on():
    observer = Observer()
    combine = Progress(step=3, layer=1, phase="combine", collective=9)
    observer.observe(1.0)
    observer.observe(2.0, progress=combine)
    peer = observer.monitor.peers()[1]
    assert peer.progress == combine and peer.heartbeat_age_s == 0.0
    assert peer.progress_age_s == pytest.approx(2.0 - PERIOD)


def test_an_observer_that_was_suspended_ages_no_peer():
    observer = Observer()
    observer.observe(1.0)
    observer.pause(60.0)
    observer.observe(PERIOD, dead=[1, 2])
    assert observer.heartbeat_age_s(1) <= 2 * PERIOD and observer.heartbeat_age_s(2) <= 2 * PERIOD
    assert observer.monitor.self_stall_s == pytest.approx(60.0 + PERIOD)


def test_a_stall_is_over_once_another_rank_has_sent_three_heartbeats():
    observer = Observer()
    observer.pause(60.0)
    for _ in range(2):  # may be from before: one in the store, not yet read, and one in flight
        observer.observe(PERIOD)
        assert observer.monitor.self_stall_s > 0
    observer.observe(PERIOD, dead=[1, 2])
    assert observer.monitor.self_stall_s > 0, "its own heartbeats prove nothing"
    observer.observe(PERIOD, dead=[1])
    assert observer.monitor.self_stall_s == 0


def test_an_observer_that_hardly_runs_counts_only_the_time_it_had():
    observer = Observer()
    observer.observe(1.0)
    for _ in range(10):
        observer.pause(0.7)  # not long enough for a stall
        observer.observe(PERIOD, dead=[2])
    assert observer.heartbeat_age_s(2) == pytest.approx(10 * 2 * PERIOD)
    assert observer.monitor.self_stall_s == 0


def test_while_the_store_does_not_answer_only_the_store_ages():
    observer = Observer()
    observer.observe(1.0)
    observer.observe(3.0, store=False)
    assert observer.monitor.store_silence_s == pytest.approx(3.0)
    assert observer.heartbeat_age_s(1) == 0.0
    observer.observe(PERIOD, dead=[1, 2])
    assert observer.monitor.store_silence_s == 0.0
    assert observer.heartbeat_age_s(1) <= 2 * PERIOD, "no heartbeat could be read in that time"
