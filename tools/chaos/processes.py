"""Ranks of a torchrun agent, found and observed through /proc."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")


def ranks_of(agent: int) -> dict[int, int]:
    """Return the agent's workers that are alive: process id by rank."""
    found = {}
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):  # it has ended
            if _parent(entry) != agent:
                continue
            # Empty for a process between fork and exec, or one that has ended.
            names = (entry / "environ").read_bytes().split(b"\0")
            for name in names:
                if name.startswith(b"RANK="):
                    found[int(name[5:])] = int(entry.name)
    return found


def alive(pid: int) -> bool:
    """Return whether a process exists and has not ended."""
    try:
        return _state(_PROC / str(pid)) not in ("Z", "X")
    except OSError:
        return False


def wait_until_gone(pids: Collection[int], within_s: float) -> bool:
    """Wait until none of the processes is alive; return False at the time limit."""
    deadline = time.monotonic() + within_s
    while any(map(alive, pids)):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def send(pid: int, signum: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, signum)


def _fields(entry: Path) -> list[str]:
    # The name, in brackets, may hold anything; state and parent follow it.
    return (entry / "stat").read_text().rpartition(")")[2].split()


def _state(entry: Path) -> str:
    return _fields(entry)[0]


def _parent(entry: Path) -> int:
    return int(_fields(entry)[1])
