"""Watchdog: every rank says a few times a second where it is, and hears where the others are.

Two threads beside the rank's work, which may be stuck in a collective that nothing can interrupt:

    talk    publishes this rank's beat in the store and reads the others'
    watch   judges what was read (`faults.py`); also that nothing could be read

Once a rank has a verdict it publishes it; whoever comes second adopts the first one's, so that all
tell the same. One rank prints the report and all end with exit code 1, at once: the job's ledger is
durable record by record. A rank that was itself stopped for a while does not take its own absence
for everybody else's.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from engine.distributed.faults import Finding, Limits, Place, Seen, State, describe, judge

EXIT_CODE = 1
_FAREWELL_S = 1.0


class Watchdog:
    """Watches over one run on one rank; a context manager. Does nothing in a run of one rank.

    store: the run's, already under a prefix of its own. holder: the rank whose process holds it,
    None where the launcher does. timeout_s: within which all survivors must have ended.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        host: str,
        timeout_s: float,
        holder: int | None,
    ) -> None:
        self._store, self._rank, self._world = store, rank, world_size
        self._holder = holder
        self._limits = Limits.of(timeout_s)
        self._period = min(max(timeout_s / 20, 0.1), 0.5)
        self._place: Callable[[], Place] = Place
        self._group: tuple[int, ...] = ()
        self._state: State = "starting"
        self._text = ""
        self._count = 0
        self._host = host
        self._over = threading.Event()
        self._said = threading.Event()
        self._lock = threading.Lock()
        now = time.monotonic()
        # rank -> (its last beat, when it was new, when it last moved)
        self._beats: dict[int, tuple[dict, float, float]] = {}
        self._talked = now
        self._verdict: str | None = None
        self._absent = 0.0
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Watchdog:
        if self._world > 1:
            for work in (self._talk, self._watch):
                thread = threading.Thread(
                    target=work, name=f"watchdog-{work.__name__}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._say("left")
        elif self._state != "failed":
            self.fail(error)
        self._over.set()
        for thread in self._threads:
            thread.join(_FAREWELL_S)

    @contextmanager
    def running(self, place: Callable[[], Place], group: Sequence[int]) -> Iterator[None]:
        """Within this block the ranks of `group` run in lockstep; place: where this one is."""
        self._place, self._group = place, tuple(group)
        self._say("running")
        try:
            yield
            self._say("finishing")
        finally:
            self._group = ()

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank fails, and with what."""
        while error.__cause__ is not None:
            error = error.__cause__
        text = str(error).strip().splitlines()
        self._text = f"{type(error).__name__}: {text[0] if text else ''}"
        self._say("failed")

    def explain(self) -> None:
        """A collective broke: end the process with a report of who is missing.

        Returns only when nobody is found to be.
        """
        if self._world == 1:
            return
        # A rank that is gone is silent from now on: no need for patience.
        short = max(1.0, 4 * self._period)
        self._limits = replace(self._limits, lost=min(short, self._limits.lost))
        time.sleep(short + 4 * self._period)  # the watch ends the process

    def _say(self, state: State) -> None:
        """Change the state and wait, but not for long, until it is published."""
        self._state = state
        self._said.clear()
        if self._threads:
            self._said.wait(_FAREWELL_S)

    def _talk(self) -> None:
        try:
            client = self._client()
            known: set[int] = set()
            while True:
                last = self._over.is_set()
                saying = self._state
                client.set(f"beat/{self._rank}", self._beat(saying))
                if saying == self._state:
                    self._said.set()
                for rank in range(self._world):
                    if rank not in known and client.check([f"beat/{rank}"]):
                        known.add(rank)
                ranks = sorted(known)
                found = client.multi_get([f"beat/{rank}" for rank in ranks])
                verdict = client.get("verdict") if client.check(["verdict"]) else None
                self._hear(dict(zip(ranks, found, strict=True)))
                if verdict is not None:
                    self._verdict = verdict.decode()
                if last:
                    return
                self._over.wait(self._period)
        except RuntimeError:  # the store is gone: the watch sees the silence
            self._said.set()

    def _client(self) -> dist.Store:
        """A connection of its own: the rank's may be waiting for something."""
        store: Any = self._store  # its stub lacks `clone`
        return store.clone()

    def _beat(self, state: State) -> str:
        self._count += 1
        beat = {"count": self._count, "host": self._host, "state": state, "text": self._text}
        return json.dumps(beat | {"place": asdict(self._place())})

    def _hear(self, found: dict[int, bytes]) -> None:
        now = time.monotonic()
        with self._lock:
            self._talked = now
            for rank, data in found.items():
                beat = json.loads(data)
                before, heard, moved = self._beats.get(rank, (None, now, now))
                if before is None or before["place"] != beat["place"]:
                    moved = now
                elif before["state"] != beat["state"]:
                    moved = now
                if before is None or before["count"] != beat["count"]:
                    heard = now
                self._beats[rank] = (beat, heard, moved)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self._period / 2):
            now = time.monotonic()
            if (gap := now - before) > 2 * self._period:
                self._forgive(gap)
                self._absent = max(self._absent, gap)
            before = now
            if self._verdict is not None:
                self._leave(self._verdict, None)
            seen = self._seen(now)
            finding = self._silence(now, seen) or judge(seen, self._rank, self._group, self._limits)
            if finding is None or self._state == "failed":
                continue
            if self._absent > self._limits.lost:
                # The others had to give this rank up and have told why.
                self._end(f"rank {self._rank} was itself stopped for {self._absent:.1f} s")
            self._leave(describe(finding, seen), finding)

    def _forgive(self, gap: float) -> None:
        """This rank was not running: what it has not heard meanwhile says nothing."""
        with self._lock:
            self._talked += gap
            for rank, (beat, heard, moved) in self._beats.items():
                self._beats[rank] = (beat, heard + gap, moved + gap)

    def _seen(self, now: float) -> dict[int, Seen]:
        with self._lock:
            return {
                rank: Seen(
                    host=beat["host"],
                    state=beat["state"],
                    place=Place(**beat["place"]),
                    # Nothing can be heard of anybody while the store is silent.
                    silent_s=max(0.0, self._talked - heard),
                    still_s=now - moved,
                    text=beat["text"],
                )
                for rank, (beat, heard, moved) in self._beats.items()
            }

    def _silence(self, now: float, seen: dict[int, Seen]) -> Finding | None:
        """A verdict on who holds the store, when the store has not answered for too long."""
        silent = now - self._talked
        if silent <= self._limits.lost:
            return None
        if self._holder is None or self._holder == self._rank:
            text = f"the launcher's store has not answered rank {self._rank} for {silent:.1f} s"
            return Finding((), text)
        who = seen.get(self._holder)
        host, place = (who.host, f"; it was last seen in {who.place}") if who else ("?", "")
        return Finding(
            (self._holder,),
            f"rank {self._holder} on {host}, which holds the store, has not answered for "
            f"{silent:.1f} s: killed, stopped or unreachable{place}",
        )

    def _leave(self, text: str, finding: Finding | None) -> None:
        """Agree on the report, let one rank print it, and end the process."""
        agreed: list[bool] = []

        def agree() -> None:
            with suppress(RuntimeError):
                client = self._client()
                told = client.compare_set("verdict", "", text).decode()
                first = client.add("printed", 1) == 1
                if first:
                    _print(told)
                agreed.append(True)
                client.add("heard", 1)
                if self._holder == self._rank:  # the others must hear it before the store goes
                    end = time.monotonic() + _FAREWELL_S
                    while client.add("heard", 0) < self._world and time.monotonic() < end:
                        time.sleep(0.02)

        helper = threading.Thread(target=agree, daemon=True)
        helper.start()
        helper.join(2 * _FAREWELL_S)
        if not agreed:
            missing = set(finding.ranks) if finding is not None else set()
            if self._rank == min(rank for rank in range(self._world) if rank not in missing):
                _print(text)
        self._end()

    def _end(self, text: str = "") -> NoReturn:
        if text:
            print(text, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)


def _print(text: str) -> None:
    print(f"{text}\nwhat has finished is kept; the same command goes on from here", file=sys.stderr)
    sys.stderr.flush()
