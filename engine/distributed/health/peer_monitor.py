"""PeerMonitor: how old everything is that a rank has heard of the others, by its own running time.

An observer that was stopped for a while, or that hardly gets to run, must not take its own absence
for everybody else's: time counts only as far as it was there to listen. `faults.py` judges the
ages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.distributed.health.diagnosis import PeerStatus
from engine.distributed.health.progress import Progress, State

# Beats of one rank from before an absence that may be read after it: one that was in the store but
# had not been taken, and one on its way. No more: a rank waits for the store's answer in between.
_OLD_BEATS = 2


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank says of itself. count: grows with every beat."""

    count: int = 0
    state: State = "starting"
    place: Progress = Progress()
    text: str = ""


class PeerMonitor:
    """What one rank has heard of all ranks of `hosts`; pure: told the time, in seconds.

    unanswered_s: since the store last answered. absent_s: how long this rank itself was not
    running, 0 once another one has been heard again for certain.
    """

    def __init__(self, own: int, hosts: Sequence[str], period_s: float, now: float) -> None:
        self.unanswered_s = 0.0
        self.absent_s = 0.0
        self._own, self._hosts = own, hosts
        self._longest_s = 2 * period_s  # a tick counts as no more
        self._absence_s = max(1.0, 4 * period_s)
        self._ticked = now
        self._beats = [Heartbeat()] * len(hosts)
        self._silent_s = [0.0] * len(hosts)
        self._still_s = [0.0] * len(hosts)
        self._heard = [0] * len(hosts)  # beats since an absence

    def tick(self, now: float, beats: Sequence[Heartbeat | None] | None) -> None:
        """Time passes. beats: what was read of every rank (None: it never said anything), or None
        when the store has not answered since the last tick.
        """
        gap, self._ticked = now - self._ticked, now
        if gap >= self._absence_s:
            self.absent_s = max(self.absent_s, gap)
            self._heard = [0] * len(self._hosts)
        self.unanswered_s += min(gap, self._longest_s)
        if beats is None:
            return
        # While the store was silent, nobody could be heard.
        passed, self.unanswered_s = min(self.unanswered_s, self._longest_s), 0.0
        for rank, beat in enumerate(beats):
            before = self._beats[rank]
            beat = beat or before
            self._silent_s[rank] += passed
            self._still_s[rank] += passed
            if (beat.state, beat.place) != (before.state, before.place):
                self._still_s[rank] = 0.0
            if beat.count != before.count:
                self._silent_s[rank] = 0.0
                self._heard[rank] += rank != self._own
            self._beats[rank] = beat
        if max(self._heard) > _OLD_BEATS:
            self.absent_s = 0.0

    def seen(self) -> dict[int, PeerStatus]:
        """Every rank as this one knows it."""
        return {
            rank: PeerStatus(
                host, beat.state, beat.place, self._silent_s[rank], self._still_s[rank], beat.text
            )
            for rank, (host, beat) in enumerate(zip(self._hosts, self._beats, strict=True))
        }
