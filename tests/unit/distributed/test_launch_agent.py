"""Workers die with their agent; a leaving rank ends its stopped siblings and nobody else.

python -m pytest tests/unit/distributed/test_launch_agent.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
# This test is the agent; the rank that leaves is a child of it, as all ranks are.
LEAVE = (
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


def leave(run: str | None) -> str:
    command = [sys.executable, "-c", LEAVE]
    return subprocess.check_output(command, env=environ(run), cwd=ROOT, text=True).strip()


def test_only_stopped_workers_of_the_same_run_are_ended(start):
    stopped, running = start("mine", stopped=True), start("mine", stopped=False)
    other, stranger = start("another", stopped=True), start(None, stopped=True)
    assert leave("mine") == f"[{stopped.pid}]"
    assert stopped.wait(10) == -signal.SIGKILL
    time.sleep(0.1)
    assert [process.poll() for process in (running, other, stranger)] == [None] * 3


def test_without_torchrun_nobody_is_ended(start):
    stopped = start(None, stopped=True)
    assert leave(None) == "[]"
    assert stopped.poll() is None


def test_workers_of_another_agent_are_left_alone(start):
    """The rank that leaves is not a child of the process that started the stopped one."""
    stopped = start("mine", stopped=True)
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LEAVE!r}])"
    command = [sys.executable, "-c", inner]
    assert subprocess.check_output(command, env=environ("mine"), cwd=ROOT, text=True) == "[]\n"
    assert stopped.poll() is None


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
    deadline = time.monotonic() + 10
    while state(worker) not in "ZX" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state(worker) in "ZX" and state(other) not in "ZX"
    os.kill(other, signal.SIGKILL)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


# --- An error of all ranks ------------------------------------------------------------------------

GO = (
    "from engine.distributed.launch_agent import wait_for_rank_0_exit as wait; "
    "wait({}); print('left')"
)
RANK_0 = [{"RANK": "0"}, {"OMPI_COMM_WORLD_RANK": "0"}, {"PMI_RANK": "0"}, {"SLURM_PROCID": "0"}]


def leaves_within(patience_s: float, limit_s: float) -> bool:
    """Whether another rank of this agent leaves within `limit_s`."""
    command = [sys.executable, "-c", GO.format(patience_s)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return False
    return done.stdout == "left\n"


@pytest.mark.parametrize("named", RANK_0, ids=lambda named: next(iter(named)))
def test_a_rank_leaves_after_rank_0_and_no_later(named):
    first = subprocess.Popen(SLEEP, env=environ(None) | named)
    try:
        assert not leaves_within(60, limit_s=2)
    finally:
        first.kill()
    # Not waited for: to its agent it is a zombie until then.
    assert leaves_within(60, limit_s=20)
    first.wait()


def test_rank_0_is_not_waited_for_longer_than_said():
    first = subprocess.Popen(SLEEP, env=environ(None) | {"RANK": "0"})
    try:
        assert leaves_within(0.1, limit_s=20)
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
def test_where_rank_0_is_on_another_host_the_first_of_this_one_goes_first(named):
    first = subprocess.Popen(SLEEP, env=environ(None) | named)
    try:
        assert not leaves_within(60, limit_s=2)
    finally:
        first.kill()
        first.wait()


def test_a_worker_of_torchrun_is_not_taken_for_the_slurm_task_it_runs_in():
    task = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    other = subprocess.Popen(SLEEP, env=environ(None) | task | {"RANK": "3", "LOCAL_RANK": "3"})
    try:
        assert leaves_within(60, limit_s=20)
    finally:
        other.kill()
        other.wait()


def test_without_rank_0_on_this_host_nobody_waits_for_long():
    other = subprocess.Popen(SLEEP, env=environ(None) | {"RANK": "3"})
    try:
        assert leaves_within(60, limit_s=20)
    finally:
        other.kill()
        other.wait()
