"""Peer monitor: per rank, time since its last heartbeat and since its last progress.

Pure: the caller passes the current time in seconds. Intervals in which the observing process itself
was suspended (SIGSTOP, swapping, no free core) are excluded, so that a rank never reports its own
stall as the failure of its peers. `diagnosis.py` turns the ages into a diagnosis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.distributed.health.diagnosis import PeerStatus
from engine.distributed.health.progress import Progress, State

# Heartbeats of one rank from before a stall that may be read after it: one that was in the store
# but not yet read, and one in flight. No more: a rank waits for the store's answer in between.
_STALE_HEARTBEATS = 2


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a rank publishes about itself."""

    count: int = 0  # increases by one per heartbeat
    state: State = "starting"
    progress: Progress = Progress()
    error: str = ""


class PeerMonitor:
    """Heartbeat and progress ages of all ranks of `hosts`, as observed by rank `own`."""

    def __init__(self, own: int, hosts: Sequence[str], period_s: float, now: float) -> None:
        self.store_silence_s = 0.0  # since the store last answered
        # How long this process was suspended; 0 once a newer heartbeat has certainly arrived.
        self.self_stall_s = 0.0
        self._own, self._hosts = own, hosts
        self._max_interval_s = 2 * period_s  # of one update; the rest is this process's own delay
        self._min_stall_s = max(1.0, 4 * period_s)
        self._updated = now
        self._heartbeats = [Heartbeat()] * len(hosts)
        self._heartbeat_age_s = [0.0] * len(hosts)
        self._progress_age_s = [0.0] * len(hosts)
        self._received = [0] * len(hosts)  # heartbeats since the last stall

    def update(self, now: float, heartbeats: Sequence[Heartbeat | None] | None) -> None:
        """Advance the ages to the time `now`.

        Args:
            now: seconds, on this process's monotonic clock.
            heartbeats: what was read of every rank, None for a rank that has published none yet;
                None as a whole when the store has not answered since the last update.
        """
        interval, self._updated = now - self._updated, now
        if interval >= self._min_stall_s:
            self.self_stall_s = max(self.self_stall_s, interval)
            self._received = [0] * len(self._hosts)
        self.store_silence_s += min(interval, self._max_interval_s)
        if heartbeats is None:
            return
        # While the store did not answer, no heartbeat could be read.
        passed, self.store_silence_s = min(self.store_silence_s, self._max_interval_s), 0.0
        for rank, new in enumerate(heartbeats):
            old = self._heartbeats[rank]
            new = new or old
            self._heartbeat_age_s[rank] += passed
            self._progress_age_s[rank] += passed
            if (new.state, new.progress) != (old.state, old.progress):
                self._progress_age_s[rank] = 0.0
            if new.count != old.count:
                self._heartbeat_age_s[rank] = 0.0
                self._received[rank] += rank != self._own
            self._heartbeats[rank] = new
        if max(self._received) > _STALE_HEARTBEATS:
            self.self_stall_s = 0.0

    def peers(self) -> dict[int, PeerStatus]:
        """Return the status of every rank, this one included."""
        known = zip(
            self._hosts, self._heartbeats, self._heartbeat_age_s, self._progress_age_s, strict=True
        )
        return {
            rank: PeerStatus(host, last.state, last.progress, age_s, progress_age_s, last.error)
            for rank, (host, last, age_s, progress_age_s) in enumerate(known)
        }
