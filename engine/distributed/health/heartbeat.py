"""Heartbeat publisher: exchanges heartbeats with all ranks through the store of the run.

A thread with its own connection, as the rank's own one may be blocked. One exchange publishes this
rank's heartbeat and reads those of all ranks and the agreed diagnosis, in three requests whatever
the number of ranks. A store whose process is stopped blocks the thread for good, so the thread does
nothing else; `watchdog.py` decides.
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

_DIAGNOSIS = "diagnosis"
_NONE = "none"


class HeartbeatPublisher:
    """Publishes the heartbeats of rank `own` and reads those of all ranks.

    Args:
        store: the store that all ranks share.
        period_s: between two exchanges.
        current: returns this rank's heartbeat; called once per exchange.
    """

    def __init__(
        self,
        store: dist.Store,
        own: int,
        world_size: int,
        period_s: float,
        current: Callable[[], Heartbeat],
    ) -> None:
        self.diagnosis: str | None = None  # what the ranks have agreed on
        self.disconnected = False  # the connection to the store is lost for good
        self._store = store
        self._key = f"heartbeat/{own}"
        self._keys = [f"heartbeat/{rank}" for rank in range(world_size)]
        self._period_s = period_s
        self._current = current
        self._all_published = False
        self._latest: list[Heartbeat | None] | None = None
        self._proposal: str | None = None
        self._wake = threading.Event()
        self._closing = False
        self._exchanges = threading.Condition()
        self._begun = self._ended = 0
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the exchanges."""
        self._thread.start()

    def poll(self) -> list[Heartbeat | None] | None:
        """Return every rank's heartbeat as last read, None for a rank without one.

        None as a whole when nothing was read since the last call.
        """
        latest, self._latest = self._latest, None
        return latest

    def flush(self, timeout_s: float) -> bool:
        """Wait for an exchange that begins now; return whether it ended within `timeout_s`."""
        with self._exchanges:
            number = self._begun + 1
            self._wake.set()
            return self._exchanges.wait_for(
                lambda: self._ended >= number or self.disconnected, timeout_s
            ) and (not self.disconnected)

    def propose(self, diagnosis: str, timeout_s: float) -> str | None:
        """Return the diagnosis that the ranks agree on: of several proposals the first.

        None when the store does not answer within `timeout_s`.
        """
        self._proposal = diagnosis
        self.flush(timeout_s)
        return self.diagnosis

    def close(self, timeout_s: float) -> None:
        """Run one last exchange and end the thread."""
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            store: Any = self._store  # its stub lacks `clone`
            client = store.clone()
            client.compare_set(_DIAGNOSIS, "", _NONE)
            while not self._exchange(client):
                self._wake.wait(self._period_s)
                self._wake.clear()
        except RuntimeError:  # the store is unreachable
            with self._exchanges:
                self.disconnected = True
                self._exchanges.notify_all()

    def _exchange(self, client: dist.Store) -> bool:
        """Run one exchange; return whether it is the last."""
        with self._exchanges:
            self._begun += 1
        last, proposal = self._closing, self._proposal
        client.set(self._key, _encode(self._current()))
        if proposal is not None:
            client.compare_set(_DIAGNOSIS, _NONE, proposal)
        *heartbeats, diagnosis = self._read(client)
        if diagnosis is not None and (text := diagnosis.decode()) != _NONE:
            self.diagnosis = text
        self._latest = [None if data is None else _decode(data) for data in heartbeats]
        with self._exchanges:
            self._ended = self._begun
            self._exchanges.notify_all()
        return last

    def _read(self, client: dist.Store) -> list[bytes | None]:
        keys = [*self._keys, _DIAGNOSIS]
        if not self._all_published:
            # Reading a key that is missing would wait for it.
            self._all_published = client.check(keys)
        if self._all_published:
            return list(client.multi_get(keys))
        return [client.get(key) if client.check([key]) else None for key in keys]


def _encode(heartbeat: Heartbeat) -> str:
    return json.dumps(asdict(heartbeat))


def _decode(data: bytes) -> Heartbeat:
    values = json.loads(data)
    return Heartbeat(**values | {"progress": Progress(**values["progress"])})
