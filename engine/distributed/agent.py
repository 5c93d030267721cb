"""Torchrun's agent and its workers: they die with it, and the stopped among them are ended.

A worker outlives an agent that is killed, holding GPUs and ports, unless it asks Linux not to:
`launch/infer.py` does so before its slow imports.

A stopped worker (SIGSTOP, a suspended job) does not hear the agent's SIGTERM: the agent waits 30 s
for it (`torchrun --shutdown-timeout`) before it kills it, and only then starts the next round. When
the run is over anyway, a survivor on the same host ends it at once.

Loads nothing slow. Linux only; elsewhere, and without torchrun, nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_PR_SET_PDEATHSIG = 1


def die_with_agent(environ: Mapping[str, str] = os.environ) -> None:
    """Ask Linux to kill this worker when torchrun's agent dies, even by SIGKILL."""
    if "TORCHELASTIC_RUN_ID" not in environ or sys.platform != "linux":
        return
    agent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent:  # it died before the request
        os._exit(1)


def end_stopped(environ: Mapping[str, str] = os.environ) -> list[int]:
    """SIGKILL the stopped workers of this rank's agent; return their process ids.

    To be called by a rank that ends its process because the run has failed.
    """
    run_id = environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None or not hasattr(os, "pidfd_open"):
        return []
    agent, ended = os.getppid(), []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        with suppress(OSError):  # it has ended, or is another user's
            process = os.pidfd_open(pid)  # first: from here on the id means this process
            try:
                if _is_stopped_child(entry, agent) and _is_worker(entry, run_id):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    ended.append(pid)
            finally:
                os.close(process)
    return ended


def _is_stopped_child(entry: Path, parent: int) -> bool:
    # The name, in brackets, may hold anything; state and parent follow it. t: under a debugger.
    state, ppid = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
    return state == "T" and int(ppid) == parent


def _is_worker(entry: Path, run_id: str) -> bool:
    """Whether a process was started as a rank of the same run."""
    names = (entry / "environ").read_bytes().split(b"\0")
    return f"TORCHELASTIC_RUN_ID={run_id}".encode() in names
