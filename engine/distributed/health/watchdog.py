"""Watchdog: every rank says a few times a second where it is, hears where the others are, and ends
its process once something is wrong.

Two threads beside the rank's work, which may be stuck in a collective that nothing can interrupt:

    beacon   publishes this rank's beat in the store and reads the others' (`beacon.py`)
    watch    ages what was read (`sightings.py`) and judges it (`faults.py`); also that nothing
             could be read, as the store may be in the process that is gone

The first rank with a verdict publishes and prints it; the others adopt it in silence. All end with
exit code 1, at once: the job's ledger is durable record by record.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch.distributed as dist

from engine.distributed.error_file import record_error
from engine.distributed.health.diagnosis import Diagnosis, Limits, describe, diagnose, store_lost
from engine.distributed.health.heartbeat import HeartbeatPublisher
from engine.distributed.health.peer_monitor import Heartbeat, PeerMonitor
from engine.distributed.health.progress import Progress, ProgressReporter, State
from engine.distributed.health.reporter import ReportElection
from engine.distributed.launch_agent import kill_stopped_workers

EXIT_CODE = 1
_PATIENCE_S = 1.0
_SIGNS = ("gloo", "NCCL", "c10d", "Connection", "Broken pipe", "shared_memory")


class Watchdog:
    """Watches over one run on one rank; a context manager. Does nothing in a run of one rank.

    store: the one that all ranks share. run: a name that no other run has. hosts: of all ranks.
    timeout_s: within which all survivors must have ended. holder: the rank whose process holds the
    store, None where the launcher does. advice: the report's last line. activity: what this rank
    does outside of the lockstep.
    """

    def __init__(
        self,
        store: dist.Store,
        run: str,
        *,
        rank: int,
        hosts: Sequence[str],
        timeout_s: float,
        holder: int | None,
        advice: str = "",
        activity: ProgressReporter | None = None,
    ) -> None:
        self._rank, self._hosts = rank, hosts
        self._holder = holder
        self._advice = advice
        self._limits = limits = Limits.of(timeout_s, len(hosts))
        self._state: State = "starting"
        self._text = ""
        self._count = 0
        activity = activity or ProgressReporter()
        self._outside = self._place = lambda: activity.place
        self._group: tuple[int, ...] = tuple(range(len(hosts)))
        self._over = threading.Event()
        own_keys = dist.PrefixStore(f"watchdog/{run}", store)
        self._beacon = HeartbeatPublisher(own_keys, rank, len(hosts), limits.period, self._beat)
        self._sightings = PeerMonitor(rank, hosts, limits.period, time.monotonic())
        self._voice = ReportElection(run)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if len(self._hosts) > 1:
            self._voice.open()
            self._beacon.start()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._thread.is_alive():
            return
        if self._state != "failed":
            self._say("left")
        self._keep_store()  # the watch still listens
        self._over.set()
        self._thread.join(_PATIENCE_S)
        self._beacon.close(_PATIENCE_S)
        self._listen()
        if self._state == "left" or self._alone():
            self._voice.drop()

    @contextmanager
    def running(self, place: Callable[[], Progress], group: Sequence[int]) -> Iterator[None]:
        """Within this block the ranks of `group` run in lockstep; place: where this one is."""
        self._place, self._group = place, tuple(group)
        self._state = "running"
        yield
        self._state, self._place = "finishing", self._outside

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank fails by its own fault, and with what."""
        while error.__cause__ is not None:
            error = error.__cause__
        self._say("failed", f"{type(error).__name__}: {_first_line(error)}")

    def explain(self, error: BaseException) -> None:
        """A collective broke with `error`: end the process with a report of who is to blame.

        Returns only when no verdict can be reached.
        """
        if self._thread.is_alive():
            self._say("cut", _first_line(error))
            time.sleep(self._limits.cut + 2 * _PATIENCE_S)  # the watch ends the process

    def _say(self, state: State, text: str = "") -> None:
        """Change the state and wait, but not for long, until it is published."""
        self._state, self._text = state, text
        if self._thread.is_alive():
            self._beacon.flush(_PATIENCE_S)

    def _beat(self) -> Heartbeat:
        self._count += 1
        return Heartbeat(self._count, self._state, self._place(), self._text)

    def _keep_store(self, listen: Callable[[], None] = lambda: None) -> None:
        """If the store is in this process, let the others leave it first, though not for long."""
        end = time.monotonic() + self._limits.quick + _PATIENCE_S
        while self._holder == self._rank and time.monotonic() < end:
            self._beacon.flush(_PATIENCE_S)
            listen()
            if self._alone():
                return
            time.sleep(0.02)

    def _alone(self) -> bool:
        """Whether nobody else is there any more."""
        return all(
            rank == self._rank
            or each.state in ("left", "failed")
            or each.heartbeat_age_s >= self._limits.quick
            for rank, each in self._sightings.seen().items()
        )

    def _listen(self) -> None:
        self._sightings.tick(time.monotonic(), self._beacon.take())

    def _watch(self) -> None:
        while not self._over.wait(self._limits.period / 2):
            self._listen()
            if self._state in ("failed", "left"):
                continue  # the rank is leaving by itself
            if self._beacon.verdict is not None:
                self._adopt(self._beacon.verdict)
            finding = self._find()
            if finding is not None and not self._over.is_set():
                self._leave(finding)

    def _find(self) -> Diagnosis | None:
        sightings, limits = self._sightings, self._limits
        seen = sightings.seen()
        if sightings.unanswered_s >= (limits.quick if self._state == "cut" else limits.lost):
            if self._holder is not None and seen[self._holder].state == "left":
                return None  # it had nothing more to wait for
            return store_lost(self._holder, seen, sightings.unanswered_s)
        return diagnose(seen, self._rank, self._group, limits)

    def _leave(self, finding: Diagnosis) -> NoReturn:
        """End the process; report what was found unless another rank does."""
        sightings = self._sightings
        seen = sightings.seen()
        report = describe(finding, seen)
        absent_s = sightings.absent_s
        answered = sightings.unanswered_s < self._limits.quick
        lost = finding.ranks if finding.lost else ()
        verdict = json.dumps({"by": self._rank, "lost": lost})
        agreed = self._beacon.propose(verdict, _PATIENCE_S) if answered else None
        if agreed is not None and agreed != verdict:
            self._adopt(agreed)
        if absent_s >= self._limits.lost:
            # The others had to give this rank up and have told why.
            text = f"rank {self._rank} on {self._own_host} was stopped for {absent_s:.1f} s"
            record_error(text)
            self._end(text)
        # Without a store nobody can agree across hosts.
        speaks = agreed is not None or self._voice.take()
        # A rank that failed by itself has recorded why.
        follows = not speaks or any(seen[rank].state == "failed" for rank in finding.ranks)
        record_error(f"{report}\n{self._advice}", follows=follows)
        self._end(f"{report}\n{self._advice}" if speaks else "")

    def _adopt(self, verdict: str) -> NoReturn:
        """Another rank has published its verdict."""
        by, lost = (json.loads(verdict)[key] for key in ("by", "lost"))
        own = f"rank {self._rank} on {self._own_host}"
        text = f"{own} was given up by the others, who have left" if self._rank in lost else ""
        left = f"{own} has left; rank {by} on {self._hosts[by]} reports why"
        record_error(text or left, follows=True)
        self._end(text)

    def _end(self, text: str) -> NoReturn:
        if ended := kill_stopped_workers():
            what = f"ended process {', '.join(map(str, ended))}, stopped, for torchrun to go on"
            text = f"{text.rstrip()}\nrank {self._rank} on {self._own_host} {what}".lstrip()

        def speak() -> None:
            with suppress(OSError, ValueError):  # a closed stream
                if text:
                    print(text.rstrip(), file=sys.stderr)
                sys.stdout.flush()
                sys.stderr.flush()

        # The rank's own thread may hold a stream's lock for good.
        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        speaker.join(_PATIENCE_S)
        self._say("left")
        self._keep_store(self._listen)
        self._voice.drop()
        os._exit(EXIT_CODE)

    @property
    def _own_host(self) -> str:
        return self._hosts[self._rank]


def is_connection_error(error: BaseException | None) -> bool:
    """Whether an error is a broken collective or store, and so rather another rank's fault."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
