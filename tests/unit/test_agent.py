"""Workers die with their agent; a leaving rank ends its stopped siblings and nobody else.

python -m pytest tests/unit/test_agent.py
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

ROOT = Path(__file__).resolve().parents[2]
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
# This test is the agent; the rank that leaves is a child of it, as all ranks are.
LEAVE = "from engine.distributed.agent import end_stopped; print(end_stopped())"


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
    child = "import time\nfrom engine.distributed.agent import die_with_agent\n"
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
