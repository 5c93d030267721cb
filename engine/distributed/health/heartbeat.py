"""HeartbeatPublisher: a rank's beats go out, the others' come in, through the store of the run.

A thread with a connection of its own: the rank's own one may be waiting for something. A round
publishes this rank's beat, reads all others' and the verdict, in three exchanges however many ranks
there are. A store whose process is stopped blocks the thread for good, which is why it only talks;
`watchdog.py` decides.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from engine.distributed.health.peer_monitor import Heartbeat
from engine.distributed.health.progress import Progress

_VERDICT = "verdict"
_NONE = "none"


class HeartbeatPublisher:
    """Talks to the store for rank `own`. current: this rank's state now, asked for every round.

    verdict: what the ranks have agreed on, if anything. broken: the connection is lost for good.
    """

    def __init__(
        self,
        store: dist.Store,
        own: int,
        world_size: int,
        period_s: float,
        current: Callable[[], Heartbeat],
    ) -> None:
        self.verdict: str | None = None
        self.broken = False
        self._store = store
        self._key = f"beat/{own}"
        self._keys = [f"beat/{rank}" for rank in range(world_size)]
        self._period_s = period_s
        self._current = current
        self._all_met = False
        self._heard: list[Heartbeat | None] | None = None
        self._proposal: str | None = None
        self._wake = threading.Event()
        self._closing = False
        self._rounds = threading.Condition()
        self._begun = self._ended = 0
        self._thread = threading.Thread(target=self._talk, name="beacon", daemon=True)

    def start(self) -> None:
        """Begin to talk."""
        self._thread.start()

    def take(self) -> list[Heartbeat | None] | None:
        """What the last round has heard of every rank; None when it was taken already."""
        heard, self._heard = self._heard, None
        return heard

    def flush(self, patience_s: float) -> bool:
        """Wait for a round that begins now, so long at most; False when it has not ended."""
        with self._rounds:
            number = self._begun + 1
            self._wake.set()
            return self._rounds.wait_for(
                lambda: self._ended >= number or self.broken, patience_s
            ) and (not self.broken)

    def propose(self, verdict: str, patience_s: float) -> str | None:
        """Return the verdict that the ranks have agreed on, of several the first; None when the
        store does not answer.
        """
        self._proposal = verdict
        self.flush(patience_s)
        return self.verdict

    def close(self, patience_s: float) -> None:
        """Say the last and end."""
        self._closing = True
        self._wake.set()
        self._thread.join(patience_s)

    def _talk(self) -> None:
        try:
            store: Any = self._store  # its stub lacks `clone`
            client = store.clone()
            client.compare_set(_VERDICT, "", _NONE)
            while not self._round(client):
                self._wake.wait(self._period_s)
                self._wake.clear()
        except RuntimeError:  # the store is gone
            with self._rounds:
                self.broken = True
                self._rounds.notify_all()

    def _round(self, client: dist.Store) -> bool:
        """One exchange; True after the last."""
        with self._rounds:
            self._begun += 1
        last, proposal = self._closing, self._proposal
        client.set(self._key, _encode(self._current()))
        if proposal is not None:
            client.compare_set(_VERDICT, _NONE, proposal)
        *beats, verdict = self._read(client)
        if verdict is not None and (text := verdict.decode()) != _NONE:
            self.verdict = text
        self._heard = [None if data is None else _decode(data) for data in beats]
        with self._rounds:
            self._ended = self._begun
            self._rounds.notify_all()
        return last

    def _read(self, client: dist.Store) -> list[bytes | None]:
        keys = [*self._keys, _VERDICT]
        if not self._all_met:
            # Only now and then: reading a key that is missing would wait for it.
            self._all_met = client.check(keys)
        if self._all_met:
            return list(client.multi_get(keys))
        return [client.get(key) if client.check([key]) else None for key in keys]


def _encode(beat: Heartbeat) -> str:
    return json.dumps(asdict(beat))


def _decode(data: bytes) -> Heartbeat:
    values = json.loads(data)
    return Heartbeat(**values | {"place": Progress(**values["place"])})
