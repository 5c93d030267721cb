"""Process stalls are noticed by the process that did not run, and nothing else is.

Run: pytest tests/unit/profiling/test_stall_detector.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from engine.profiling.stall_detector import StallDetector

ROOT = Path(__file__).resolve().parents[3]
CHILD = """
import sys, time
from engine.profiling.stall_detector import StallDetector
with StallDetector() as stalls:
    time.sleep(0.2)
    print("here", flush=True)
    sys.stdin.readline()
    time.sleep(0.2)
print(stalls.count, stalls.seconds)
"""


def test_a_process_that_was_stopped_knows_how_often_and_for_how_long():
    command = [sys.executable, "-c", CHILD]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "here\n"
        stopped = 0.0
        for _ in range(2):
            began = time.monotonic()
            os.kill(child.pid, signal.SIGSTOP)
            time.sleep(0.6)
            os.kill(child.pid, signal.SIGCONT)
            stopped += time.monotonic() - began
            time.sleep(0.4)
        child.stdin.write("\n")
        child.stdin.flush()
        count, seconds = child.stdout.readline().split()
    assert int(count) >= 2
    assert stopped - 0.2 < float(seconds), "the pause of the thread itself is not counted"


def test_no_thread_runs_where_it_is_off():
    before = threading.active_count()
    with StallDetector(enabled=False) as stalls:
        assert threading.active_count() == before
    assert (stalls.count, stalls.seconds) == (0, 0.0)


def test_the_thread_is_gone_after_a_failure():
    before = threading.active_count()
    try:
        with StallDetector():
            raise OSError
    except OSError:
        assert threading.active_count() == before
