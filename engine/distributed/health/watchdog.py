"""Watchdog: publishes this rank's heartbeat, monitors its peers, and exits on a fault.

Two threads next to the rank's own, which may be blocked in a collective that nothing can interrupt:

    heartbeat   publishes this rank's heartbeat in the store and reads the others' (`heartbeat.py`)
    watchdog    measures the ages of what was read (`peer_monitor.py`) and diagnoses faults
                (`diagnosis.py`); also a store that does not answer, as its process may be dead

The first rank with a diagnosis publishes and prints it; the others accept the published diagnosis
and print nothing. All exit with code 1 at once: the job's ledger is durable record by record.
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
from engine.distributed.health.diagnosis import Diagnosis, Limits, diagnose, diagnose_store
from engine.distributed.health.heartbeat import HeartbeatPublisher
from engine.distributed.health.peer_monitor import Heartbeat, PeerMonitor
from engine.distributed.health.progress import Progress, ProgressReporter, State
from engine.distributed.health.reporter import ReportElection
from engine.distributed.launch_agent import kill_stopped_workers

EXIT_CODE = 1
_PUBLISH_TIMEOUT_S = 1.0
_CONNECTION_ERRORS = ("gloo", "NCCL", "c10d", "Connection", "Broken pipe", "shared_memory")


class Watchdog:
    """Context manager that monitors one run on one rank. Does nothing in a run of one rank.

    Args:
        store: the store that all ranks share.
        run: a name that no other run has.
        hosts: host of every rank.
        timeout_s: within which all survivors must have exited.
        store_rank: the rank whose process holds the store, None where the launcher does.
        advice: the report's last line.
        reporter: this rank's progress outside of the lockstep.
    """

    def __init__(
        self,
        store: dist.Store,
        run: str,
        *,
        rank: int,
        hosts: Sequence[str],
        timeout_s: float,
        store_rank: int | None,
        advice: str = "",
        reporter: ProgressReporter | None = None,
    ) -> None:
        self._rank, self._hosts = rank, hosts
        self._store_rank = store_rank
        self._advice = advice
        self._limits = limits = Limits.of(timeout_s, len(hosts))
        self._state: State = "starting"
        self._error = ""
        self._count = 0
        reporter = reporter or ProgressReporter()
        self._outside = self._progress = lambda: reporter.progress
        self._group: tuple[int, ...] = tuple(range(len(hosts)))
        self._closed = threading.Event()
        keys = dist.PrefixStore(f"watchdog/{run}", store)
        self._publisher = HeartbeatPublisher(keys, rank, len(hosts), limits.period_s, self._current)
        self._monitor = PeerMonitor(rank, hosts, limits.period_s, time.monotonic())
        self._election = ReportElection(run)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if len(self._hosts) > 1:
            self._election.open()
            self._publisher.start()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._thread.is_alive():
            return
        if self._state != "failed":
            self._publish("exited")
        self._keep_store()  # the watchdog's thread still updates the monitor
        self._closed.set()
        self._thread.join(_PUBLISH_TIMEOUT_S)
        self._publisher.close(_PUBLISH_TIMEOUT_S)
        self._update_monitor()
        if self._state == "exited" or self._is_last():
            self._election.release()

    @contextmanager
    def running(self, progress: Callable[[], Progress], group: Sequence[int]) -> Iterator[None]:
        """Within this block the ranks of `group` run in lockstep.

        progress: returns this rank's progress; called from another thread.
        """
        self._progress, self._group = progress, tuple(group)
        self._state = "running"
        yield
        self._state, self._progress = "finishing", self._outside

    def fail(self, error: BaseException) -> None:
        """Publish that this rank fails by its own fault, and with which error."""
        while error.__cause__ is not None:
            error = error.__cause__
        self._publish("failed", f"{type(error).__name__}: {_first_line(error)}")

    def explain(self, error: BaseException) -> None:
        """End the process with a report of why a collective failed with `error`.

        Returns only when no diagnosis can be reached.
        """
        if self._thread.is_alive():
            self._publish("collective_failed", _first_line(error))
            # The watchdog's thread ends the process.
            time.sleep(self._limits.collective_timeout_s + 2 * _PUBLISH_TIMEOUT_S)

    def _publish(self, state: State, error: str = "") -> None:
        """Change the state and wait for a limited time until it is published."""
        self._state, self._error = state, error
        if self._thread.is_alive():
            self._publisher.flush(_PUBLISH_TIMEOUT_S)

    def _current(self) -> Heartbeat:
        self._count += 1
        return Heartbeat(self._count, self._state, self._progress(), self._error)

    def _keep_store(self, update: Callable[[], None] = lambda: None) -> None:
        """If this process holds the store, wait for a limited time until the others have exited."""
        end = time.monotonic() + self._limits.short_timeout_s + _PUBLISH_TIMEOUT_S
        while self._store_rank == self._rank and time.monotonic() < end:
            self._publisher.flush(_PUBLISH_TIMEOUT_S)
            update()
            if self._is_last():
                return
            time.sleep(0.02)

    def _is_last(self) -> bool:
        """Return whether all other ranks have exited or are dead."""
        return all(
            rank == self._rank
            or each.state in ("exited", "failed")
            or each.heartbeat_age_s >= self._limits.short_timeout_s
            for rank, each in self._monitor.peers().items()
        )

    def _update_monitor(self) -> None:
        self._monitor.update(time.monotonic(), self._publisher.poll())

    def _watch(self) -> None:
        while not self._closed.wait(self._limits.period_s / 2):
            self._update_monitor()
            if self._state in ("failed", "exited"):
                continue  # the rank exits by itself
            if self._publisher.diagnosis is not None:
                self._accept(self._publisher.diagnosis)
            diagnosis = self._diagnose()
            if diagnosis is not None and not self._closed.is_set():
                self._declare(diagnosis)

    def _diagnose(self) -> Diagnosis | None:
        limits, peers = self._limits, self._monitor.peers()
        silence_s, failed = self._monitor.store_silence_s, self._state == "collective_failed"
        if silence_s >= (limits.short_timeout_s if failed else limits.heartbeat_timeout_s):
            if self._store_rank is not None and peers[self._store_rank].state == "exited":
                return None  # it had no reason to wait any longer
            return diagnose_store(self._store_rank, peers, silence_s)
        return diagnose(peers, self._rank, self._group, limits)

    def _declare(self, diagnosis: Diagnosis) -> NoReturn:
        """End the process; print the report unless another rank does."""
        peers = self._monitor.peers()
        report = f"{diagnosis.report(peers)}\n{self._advice}"
        stall_s = self._monitor.self_stall_s
        answers = self._monitor.store_silence_s < self._limits.short_timeout_s
        unreachable = diagnosis.ranks if diagnosis.unreachable else ()
        own = json.dumps({"by": self._rank, "unreachable": unreachable})
        agreed = self._publisher.propose(own, _PUBLISH_TIMEOUT_S) if answers else None
        if agreed is not None and agreed != own:
            self._accept(agreed)
        if stall_s >= self._limits.heartbeat_timeout_s:
            # The others had to declare this rank dead and have reported why.
            text = f"rank {self._rank} on {self._own_host} was suspended for {stall_s:.1f} s"
            record_error(text)
            self._exit(text)
        # Without a store, ranks of several hosts cannot agree on one reporter.
        reports = agreed is not None or self._election.try_acquire()
        # A rank that failed by itself has recorded why.
        follows = not reports or any(peers[rank].state == "failed" for rank in diagnosis.ranks)
        record_error(report, follows=follows)
        self._exit(report if reports else "")

    def _accept(self, published: str) -> NoReturn:
        """End the process because of the diagnosis that another rank has published."""
        by, unreachable = (json.loads(published)[key] for key in ("by", "unreachable"))
        own = f"rank {self._rank} on {self._own_host}"
        dead = f"{own} was declared dead by the other ranks, which have exited"
        text = dead if self._rank in unreachable else ""
        exited = f"{own} has exited; rank {by} on {self._hosts[by]} reports why"
        record_error(text or exited, follows=True)
        self._exit(text)

    def _exit(self, text: str) -> NoReturn:
        if killed := kill_stopped_workers():
            what = f"killed stopped process {', '.join(map(str, killed))}, so that torchrun goes on"
            text = f"{text.rstrip()}\nrank {self._rank} on {self._own_host} {what}".lstrip()

        def write() -> None:
            with suppress(OSError, ValueError):  # a closed stream
                if text:
                    print(text.rstrip(), file=sys.stderr)
                sys.stdout.flush()
                sys.stderr.flush()

        # The rank's own thread may hold a stream's lock for good.
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(_PUBLISH_TIMEOUT_S)
        self._publish("exited")
        self._keep_store(self._update_monitor)
        self._election.release()
        os._exit(EXIT_CODE)

    @property
    def _own_host(self) -> str:
        return self._hosts[self._rank]


def is_connection_error(error: BaseException | None) -> bool:
    """Return whether a collective or the store failed, and so probably because of another rank."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(s in str(error) for s in _CONNECTION_ERRORS)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
