"""A torchrun agent and its ranks, one fault after the other done to them, and what came of each."""

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

_START_S = 30.0  # of an agent, to have started its ranks
_WORK_S = 60.0  # of the ranks, to write a first record
_HEAL_S = 60.0  # of the ranks, to go on after a fault that they may survive
_TAIL = 4000


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fault led to. injected: False where the job had ended before its moment.

    gone_s: from the fault to the last rank's end. back_s: to the start of the next ranks by the
    same agent. Both None where the ranks went on. hang: what did not end in time, "" for nothing.
    """

    fault: Fault
    num_ranks: int
    injected: bool
    gone_s: float | None = None
    back_s: float | None = None
    hang: str = ""


class Session:
    """One `torchrun` of a job. Use as a context manager: nothing of it stays behind."""

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
        """bound_s: within which all ranks must have ended after a fault.

        disk: the small file system that `output` is on, if it is on one.
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
        """What agent and ranks have printed so far."""
        return "".join(self._lines)

    def finish(self, within_s: float) -> int | None:
        """The agent's exit code, None when it has not ended in time."""
        try:
            return self._agent.wait(within_s)
        except subprocess.TimeoutExpired:
            return None

    def hit(self, fault: Fault) -> Outcome:
        """Wait for the fault's moment, do it and wait until the ranks have ended or go on."""
        ranks = self._moment(fault)
        if isinstance(ranks, str):
            return Outcome(fault, self.num_ranks, injected=False, hang=ranks)
        before = time.monotonic()
        try:
            undo = self._inject(fault, ranks)
        except LookupError:  # the victim had ended by itself
            return Outcome(fault, self.num_ranks, injected=False)
        try:
            if fault.kind in SURVIVABLE and self._goes_on(fault, ranks, undo):
                return Outcome(fault, self.num_ranks, injected=True)
            return self._aftermath(fault, ranks, before)
        finally:
            undo()

    def _aftermath(self, fault: Fault, ranks: dict[int, int], before: float) -> Outcome:
        pids = list(ranks.values())
        victim = ranks[fault.rank(self.num_ranks)]
        if not wait_until_gone(pids, self._bound_s):
            if fault.kind == "stop_rank" and self._was_leaving(victim, pids):
                send(victim, signal.SIGCONT)
                return Outcome(fault, self.num_ranks, injected=False)
            return Outcome(fault, self.num_ranks, injected=True, hang=self._stacks(pids))
        gone_s = time.monotonic() - before
        if fault.kind == "disk_full":
            self._free()  # the next ranks find room
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

    def _was_leaving(self, victim: int, pids: Sequence[int]) -> bool:
        """Whether the job was complete and only the victim, stopped on its way out, is left."""
        return self._output.exists() and [pid for pid in pids if alive(pid)] == [victim]

    def _moment(self, fault: Fault) -> dict[int, int] | str:
        """The ranks, at the time of the fault; or what is wrong, "" if the job is over."""
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
        """Wait until it holds, the agent has ended (both True) or time is up (False)."""
        deadline = time.monotonic() + within_s
        while not holds() and not self.ended:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    def _inject(self, fault: Fault, ranks: dict[int, int]) -> Callable[[], None]:
        """Do it; return what takes it back."""
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
            assert self._network is not None, "such a fault is not chosen"
            self._network.slow(fault.rate)
            return self._network.restore
        elif self._disk is not None:
            places.fill(self._disk)
            return self._free
        else:
            for pid in ranks.values():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, 1))
        return lambda: None

    def _goes_on(self, fault: Fault, ranks: dict[int, int], undo: Callable[[], None]) -> bool:
        """Whether the ranks survive the fault, which is taken back after a while."""
        wait_until_gone(ranks.values(), fault.held_s)
        undo()
        if fault.kind == "pause_rank":
            send(ranks[fault.rank(self.num_ranks)], signal.SIGCONT)
        begun = written(self._output)
        # A rank that gives up takes the others with it; all that is asked is that something moves.
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
        """Ranks that the agent has started since."""
        return set(self._find().values()) - set(ranks.values())

    def _stacks(self, pids: Sequence[int]) -> str:
        """End the ranks with a stack each; return the end of the log."""
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
