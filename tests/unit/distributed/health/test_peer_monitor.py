"""What a rank makes of the beats it hears, on a made-up clock.

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
    """Rank 0, told every PERIOD what the ranks say; counts for them."""

    def __init__(self) -> None:
        self.now = 100.0
        self.counts = [0, 0, 0]
        self.sightings = PeerMonitor(0, HOSTS, PERIOD, self.now)

    def listen(
        self,
        seconds: float,
        silent: Sequence[int] = (),
        place: Progress | None = None,
        store: bool = True,
    ) -> None:
        """Let time pass, during which all ranks beat but those in `silent`."""
        for _ in range(round(seconds / PERIOD)):
            self.now += PERIOD
            for rank in range(3):
                self.counts[rank] += rank not in silent
            self.sightings.tick(self.now, self.beats(place) if store else None)

    def beats(self, place: Progress | None = None) -> list[Heartbeat | None]:
        return [Heartbeat(count, "running", place or Progress()) for count in self.counts]

    def pause(self, seconds: float) -> None:
        """Do not run at all."""
        self.now += seconds

    def heartbeat_age_s(self, rank: int) -> float:
        return self.sightings.seen()[rank].heartbeat_age_s


def test_silence_counts_from_the_last_new_beat():
    observer = Observer()
    observer.listen(2.0)
    observer.listen(3.0, silent=[2])
    assert observer.heartbeat_age_s(2) == pytest.approx(3.0)
    assert observer.heartbeat_age_s(0) == observer.heartbeat_age_s(1) == 0.0
    observer.listen(PERIOD)
    assert observer.heartbeat_age_s(2) == 0.0


def test_a_rank_that_never_said_anything_is_silent_from_the_start_and_starting():
    observer = Observer()
    for _ in range(8):
        observer.now += PERIOD
        observer.counts[0] += 1
        observer.sightings.tick(observer.now, [Heartbeat(observer.counts[0]), None, None])
    seen = observer.sightings.seen()[2]
    assert (seen.host, seen.state) == ("h1", "starting")
    assert seen.heartbeat_age_s == pytest.approx(2.0)


def test_standing_still_counts_from_the_last_change_of_place_while_beats_go_on():
    observer = Observer()
    combine = Progress(step=3, layer=1, phase="combine", collective=9)
    observer.listen(1.0)
    observer.listen(2.0, place=combine)
    seen = observer.sightings.seen()[1]
    assert seen.place == combine and seen.heartbeat_age_s == 0.0
    assert seen.progress_age_s == pytest.approx(2.0 - PERIOD)


def test_an_observer_that_was_stopped_accuses_nobody():
    observer = Observer()
    observer.listen(1.0)
    observer.pause(60.0)
    observer.listen(PERIOD, silent=[1, 2])
    assert observer.heartbeat_age_s(1) <= 2 * PERIOD and observer.heartbeat_age_s(2) <= 2 * PERIOD
    assert observer.sightings.absent_s == pytest.approx(60.0 + PERIOD)


def test_an_absence_is_over_once_another_rank_is_heard_three_times():
    observer = Observer()
    observer.pause(60.0)
    for _ in range(2):  # may be from before: one in the store, not yet taken, and one on its way
        observer.listen(PERIOD)
        assert observer.sightings.absent_s > 0
    observer.listen(PERIOD, silent=[1, 2])
    assert observer.sightings.absent_s > 0, "its own beats prove nothing"
    observer.listen(PERIOD, silent=[1])
    assert observer.sightings.absent_s == 0


def test_an_observer_that_hardly_runs_counts_only_the_time_it_had():
    observer = Observer()
    observer.listen(1.0)
    for _ in range(10):
        observer.pause(0.7)  # not long enough to be an absence
        observer.listen(PERIOD, silent=[2])
    assert observer.heartbeat_age_s(2) == pytest.approx(10 * 2 * PERIOD)
    assert observer.sightings.absent_s == 0


def test_while_the_store_is_silent_only_the_store_ages():
    observer = Observer()
    observer.listen(1.0)
    observer.listen(3.0, store=False)
    assert observer.sightings.unanswered_s == pytest.approx(3.0)
    assert observer.heartbeat_age_s(1) == 0.0
    observer.listen(PERIOD, silent=[1, 2])
    assert observer.sightings.unanswered_s == 0.0
    assert observer.heartbeat_age_s(1) <= 2 * PERIOD, "nobody could be heard meanwhile"
