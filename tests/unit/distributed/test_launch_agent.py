"""Workers die with their agent; an exiting rank kills its stopped siblings and no other process.

python -m pytest tests/unit/distributed/test_launch_agent.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.polling import await_true

ROOT = Path(__file__).resolve().parents[3]
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
# This test is the agent; the rank that exits is a child of it, as all ranks are.
KILL = (
    "from engine.distributed.launch_agent import kill_stopped_workers; "
    "print(kill_stopped_workers())"
)


def environ(run: str | None) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if "TORCHELASTIC" not in name}
    return clean | ({} if run is None else {"TORCHELASTIC_RUN_ID": run})


@pytest.fixture
def start() -> Iterator:
    processes = []

    def start(run: str | None, *, stopped: bool) -> subprocess.Popen:
        process = subprocess.Popen(SLEEP, env=environ(run))
        processes.append(process)
        if stopped:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def was_untouched(process: subprocess.Popen) -> bool:
    """End a process by a signal of our own; return whether no other one has ended it before."""
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGCONT)
    return process.wait(60) == -signal.SIGUSR1


def kill_stopped(run: str | None) -> str:
    command = [sys.executable, "-c", KILL]
    return subprocess.check_output(command, env=environ(run), cwd=ROOT, text=True).strip()


def test_only_stopped_workers_of_the_same_run_are_killed(start):
    stopped, running = start("mine", stopped=True), start("mine", stopped=False)
    other, stranger = start("another", stopped=True), start(None, stopped=True)
    assert kill_stopped("mine") == f"[{stopped.pid}]"
    assert stopped.wait(10) == -signal.SIGKILL
    assert all(map(was_untouched, (running, other, stranger)))


def test_without_torchrun_no_process_is_killed(start):
    stopped = start(None, stopped=True)
    assert kill_stopped(None) == "[]"
    assert was_untouched(stopped)


def test_workers_of_another_agent_are_not_killed(start):
    """The rank that exits is not a child of the process that started the stopped one."""
    stopped = start("mine", stopped=True)
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {KILL!r}])"
    command = [sys.executable, "-c", inner]
    assert subprocess.check_output(command, env=environ("mine"), cwd=ROOT, text=True) == "[]\n"
    assert was_untouched(stopped)


def test_a_worker_dies_with_its_agent_and_anything_else_does_not():
    """Two processes of one parent that is killed: one with torchrun's environment, one without."""
    child = "import time\nfrom engine.distributed.launch_agent import die_with_agent\n"
    child += "die_with_agent()\nprint('ready', flush=True)\ntime.sleep(60)"
    agent = "import os, subprocess, sys, time\n"
    agent += "for run in (dict(TORCHELASTIC_RUN_ID='r'), {}):\n"
    agent += f"    p = subprocess.Popen([sys.executable, '-c', {child!r}], env=os.environ | run,"
    agent += " stdout=subprocess.PIPE, text=True)\n"
    agent += "    print(p.pid, p.stdout.readline(), end='', flush=True)\n"
    agent += "time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", agent],
        env=environ(None),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    worker, other = (int(process.stdout.readline().split()[0]) for _ in range(2))
    process.kill()
    process.wait()
    await_true(lambda: state(worker) in "ZX")
    assert state(other) not in "ZX"
    os.kill(other, signal.SIGKILL)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


# --- An error of all ranks ------------------------------------------------------------------------

WAIT = (
    "from engine.distributed.launch_agent import wait_for_rank_0_exit as wait; "
    "wait({}); print('done')"
)
RANK_0 = [{"RANK": "0"}, {"OMPI_COMM_WORLD_RANK": "0"}, {"PMI_RANK": "0"}, {"SLURM_PROCID": "0"}]


def exits_within(timeout_s: float, limit_s: float) -> bool:
    """Return whether another rank of this agent exits within `limit_s`."""
    command = [sys.executable, "-c", WAIT.format(timeout_s)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return False
    return done.stdout == "done\n"


@pytest.mark.parametrize("named", RANK_0, ids=lambda named: next(iter(named)))
def test_a_rank_exits_right_after_rank_0(named):
    first = subprocess.Popen(SLEEP, env=environ(None) | named)
    try:
        assert not exits_within(60, limit_s=2)
    finally:
        first.kill()
    # Not waited for: to its agent it is a zombie until then.
    assert exits_within(60, limit_s=20)
    first.wait()


def test_rank_0_is_not_waited_for_longer_than_the_timeout():
    first = subprocess.Popen(SLEEP, env=environ(None) | {"RANK": "0"})
    try:
        assert exits_within(0.1, limit_s=20)
    finally:
        first.kill()
        first.wait()


LOCAL_RANK_0 = [
    {"RANK": "8", "LOCAL_RANK": "0"},
    {"OMPI_COMM_WORLD_RANK": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    {"PMI_RANK": "8", "MPI_LOCALRANKID": "0"},
    {"SLURM_PROCID": "8", "SLURM_LOCALID": "0"},
]


@pytest.mark.parametrize("named", LOCAL_RANK_0, ids=lambda named: next(iter(named)))
def test_where_rank_0_is_on_another_host_the_first_rank_of_this_one_exits_first(named):
    first = subprocess.Popen(SLEEP, env=environ(None) | named)
    try:
        assert not exits_within(60, limit_s=2)
    finally:
        first.kill()
        first.wait()


def test_a_worker_of_torchrun_is_not_taken_for_the_slurm_task_it_runs_in():
    task = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    other = subprocess.Popen(SLEEP, env=environ(None) | task | {"RANK": "3", "LOCAL_RANK": "3"})
    try:
        assert exits_within(60, limit_s=20)
    finally:
        other.kill()
        other.wait()


def test_without_rank_0_on_this_host_the_wait_is_short():
    other = subprocess.Popen(SLEEP, env=environ(None) | {"RANK": "3"})
    try:
        assert exits_within(60, limit_s=20)
    finally:
        other.kill()
        other.wait()
