"""A torchrun agent and its ranks: injects faults one after the other, observes the outcomes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.parts import written

from chaos import places
from chaos.faults import ENDS_AGENT, SURVIVABLE, Fault
from chaos.job import tear, torchrun
from chaos.places import Network
from chaos.processes import alive, ranks_of, send, wait_until_gone

_START_S = 30.0  # limit for the agent to start its ranks
_WORK_S = 60.0  # limit for the ranks' first record
_HEAL_S = 60.0  # limit for the ranks to continue after a survivable fault
_TAIL = 4000


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of a fault."""

    fault: Fault
    num_ranks: int
    injected: bool  # False where the job had ended before
    gone_s: float | None = None  # until the last rank ended; None: the ranks continued
    back_s: float | None = None  # until the same agent restarted ranks
    hang: str = ""  # what did not end in time, "" for nothing


class Session:
    """One `torchrun` of a job. A context manager: on leaving, all its processes are ended."""

    def __init__(
        self,
        command: Sequence[str],
        output: Path,
        *,
        num_ranks: int,
        max_restarts: int,
        bound_s: float,
        network: Network | None,
        disk: Path | None,
    ) -> None:
        """Start the agent.

        Args:
            bound_s: within which all ranks must have ended after a fault.
            network: that of the ranks; None: the host's.
            disk: the small file system that `output` is on; None: not on one.
        """
        self.num_ranks = num_ranks
        self._output, self._bound_s = output, bound_s
        self._network, self._disk = network, disk
        line = [*(network.command if network else []), *torchrun(num_ranks, max_restarts), *command]
        # A stack of every thread from a rank that hangs, at SIGABRT.
        environ = {"PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}
        self._agent = subprocess.Popen(
            line,
            env=os.environ | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._known: set[int] = set()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self._find()
        for pid in (self._agent.pid, *self._known):
            send(pid, signal.SIGKILL)
        self._agent.wait()
        wait_until_gone(self._known, 10.0)
        self._reader.join(5.0)

    @property
    def ended(self) -> bool:
        """Whether the agent has ended."""
        return self._agent.poll() is not None

    @property
    def log(self) -> str:
        """Output of agent and ranks so far."""
        return "".join(self._lines)

    def finish(self, within_s: float) -> int | None:
        """Return the agent's exit code, None when it has not ended in time."""
        try:
            return self._agent.wait(within_s)
        except subprocess.TimeoutExpired:
            return None

    def hit(self, fault: Fault) -> Outcome:
        """Wait for the fault's time, inject it and wait until the ranks have ended or continue."""
        ranks = self._moment(fault)
        if isinstance(ranks, str):
            return Outcome(fault, self.num_ranks, injected=False, hang=ranks)
        before = time.monotonic()
        try:
            undo = self._inject(fault, ranks)
        except LookupError:  # the victim had ended by itself
            return Outcome(fault, self.num_ranks, injected=False)
        try:
            if fault.kind in SURVIVABLE and self._continues(fault, ranks, undo):
                return Outcome(fault, self.num_ranks, injected=True)
            return self._aftermath(fault, ranks, before)
        finally:
            undo()

    def _aftermath(self, fault: Fault, ranks: dict[int, int], before: float) -> Outcome:
        pids = list(ranks.values())
        victim = ranks[fault.rank(self.num_ranks)]
        if not wait_until_gone(pids, self._bound_s):
            if fault.kind == "stop_rank" and self._was_exiting(victim, pids):
                send(victim, signal.SIGCONT)
                return Outcome(fault, self.num_ranks, injected=False)
            return Outcome(fault, self.num_ranks, injected=True, hang=self._stacks(pids))
        gone_s = time.monotonic() - before
        if fault.kind == "disk_full":
            self._free()  # so that the next ranks can write
        back_s = None
        if fault.kind in ENDS_AGENT:
            if self.finish(self._bound_s) is None:
                hang = "the agent did not end"
                return Outcome(fault, self.num_ranks, injected=True, gone_s=gone_s, hang=hang)
            if fault.kind == "torn_tail":
                tear(self._output, fault.torn)
        elif self._wait(lambda: bool(self._others(ranks)), self._bound_s) and not self.ended:
            back_s = time.monotonic() - before
        return Outcome(fault, self.num_ranks, injected=True, gone_s=gone_s, back_s=back_s)

    def _was_exiting(self, victim: int, pids: Sequence[int]) -> bool:
        """Return whether the job was complete and only the victim, stopped at its exit, is left."""
        return self._output.exists() and [pid for pid in pids if alive(pid)] == [victim]

    def _moment(self, fault: Fault) -> dict[int, int] | str:
        """Return the ranks at the time of the fault; or what is wrong, "" if the job is over."""
        if not self._wait(lambda: len(self._find()) == self.num_ranks, _START_S):
            return f"the agent has not started {self.num_ranks} ranks in {_START_S:g} s"
        if not fault.early:
            begun = written(self._output)
            if not self._wait(lambda: written(self._output) != begun, _WORK_S):
                return self._stacks(list(self._find().values()))
        self._wait(lambda: False, fault.after_s)
        ranks = self._find()
        return "" if self.ended or len(ranks) < self.num_ranks else ranks

    def _wait(self, holds: Callable[[], bool], within_s: float) -> bool:
        """Wait until `holds` or the agent has ended (True), or until the time limit (False)."""
        deadline = time.monotonic() + within_s
        while not holds() and not self.ended:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    def _inject(self, fault: Fault, ranks: dict[int, int]) -> Callable[[], None]:
        """Inject the fault; return a function that removes it."""
        victim = ranks[fault.rank(self.num_ranks)]
        if fault.kind in ("kill_rank", "stop_rank", "pause_rank"):
            if not alive(victim):
                raise LookupError
            send(victim, signal.SIGKILL if fault.kind == "kill_rank" else signal.SIGSTOP)
        elif fault.kind in ("kill_agent", "torn_tail"):
            self._agent.kill()
        elif fault.kind == "term_agent":
            self._agent.terminate()
        elif fault.kind == "slow_link":
            assert self._network is not None, "slow_link needs a network"
            self._network.slow(fault.rate)
            return self._network.restore
        elif self._disk is not None:
            places.fill(self._disk)
            return self._free
        else:
            for pid in ranks.values():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, 1))
        return lambda: None

    def _continues(self, fault: Fault, ranks: dict[int, int], undo: Callable[[], None]) -> bool:
        """Remove the fault after a while; return whether the ranks survive it."""
        wait_until_gone(ranks.values(), fault.held_s)
        undo()
        if fault.kind == "pause_rank":
            send(ranks[fault.rank(self.num_ranks)], signal.SIGCONT)
        begun = written(self._output)
        # A rank that times out ends the others; either progress or an end is right.
        self._wait(
            lambda: written(self._output) != begun or not all(map(alive, ranks.values())), _HEAL_S
        )
        return all(map(alive, ranks.values())) and written(self._output) != begun or self.ended

    def _free(self) -> None:
        if self._disk is not None:
            places.free(self._disk)

    def _find(self) -> dict[int, int]:
        ranks = ranks_of(self._agent.pid)
        self._known |= set(ranks.values())
        return ranks

    def _others(self, ranks: dict[int, int]) -> set[int]:
        """Return ranks that the agent has started since."""
        return set(self._find().values()) - set(ranks.values())

    def _stacks(self, pids: Sequence[int]) -> str:
        """End the ranks, each printing its stacks; return the end of the log."""
        left = [pid for pid in pids if alive(pid)]
        for pid in left:
            send(pid, signal.SIGCONT)
            send(pid, signal.SIGABRT)
        wait_until_gone(left, 5.0)
        return f"processes {left} did not end or move; the log ends:\n{self.log[-_TAIL:]}"

    def _read(self) -> None:
        assert self._agent.stdout is not None
        for line in self._agent.stdout:
            self._lines.append(line)
