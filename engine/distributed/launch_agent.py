"""The launcher's agent on a host and its workers: what each must know of the others' ends.

A worker outlives an agent that is killed, holding GPUs and ports, unless it asks Linux not to:
`launch/infer.py` does so before its slow imports.

A stopped worker (SIGSTOP, a suspended job) does not hear the agent's SIGTERM: the agent waits 30 s
for it (`torchrun --shutdown-timeout`) before it kills it, and only then starts the next round. When
the run is over anyway, a survivor on the same host ends it at once.

Launchers end all workers when one has left. An error that all ranks have is told by rank 0, one
that they do not know of by the first rank of its host, so the others let these go first.

Loads nothing slow. Linux only; elsewhere, and without such a launcher, nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc")
_PR_SET_PDEATHSIG = 1
_HEAD_START_S = 1.0
# Who a worker is in the run and on its host, under torchrun and DeepSpeed, Open MPI, MPICH, Slurm.
_RANKS = {
    "RANK": "LOCAL_RANK",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_RANK": "MPI_LOCALRANKID",
    "SLURM_PROCID": "SLURM_LOCALID",
}


def die_with_agent(environ: Mapping[str, str] = os.environ) -> None:
    """Ask Linux to kill this worker when torchrun's agent dies, even by SIGKILL."""
    if "TORCHELASTIC_RUN_ID" not in environ or sys.platform != "linux":
        return
    agent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent:  # it died before the request
        os._exit(1)


def kill_stopped_workers(environ: Mapping[str, str] = os.environ) -> list[int]:
    """SIGKILL the stopped workers of this rank's agent; return their process ids.

    To be called by a rank that ends its process because the run has failed.
    """
    run_id = environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None or not hasattr(os, "pidfd_open"):
        return []
    ended = []
    for entry in _siblings():
        pid = int(entry.name)
        with suppress(OSError):  # it has ended, or is another user's
            process = os.pidfd_open(pid)  # first: from here on the id means this process
            try:
                own = {"TORCHELASTIC_RUN_ID": run_id}.items() <= _environ(entry).items()
                if own and _state(entry) == ("T", os.getppid()):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    ended.append(pid)
            finally:
                os.close(process)
    return ended


def wait_for_rank_0_exit(patience_s: float) -> None:
    """Wait until rank 0, or else its host's first rank, has left, at most `patience_s`.

    Sees workers of the same agent; rank 0 on another host only gets a head start. To be called by
    another rank before it ends its process because of an error of all ranks.
    """
    first = [entry for entry in _siblings() if "0" in _ranks(entry)]
    if not first:
        time.sleep(min(_HEAD_START_S, patience_s))
    deadline = time.monotonic() + patience_s
    while any(map(_is_alive, first)) and time.monotonic() < deadline:
        time.sleep(0.02)


def _siblings() -> Iterator[Path]:
    """Other processes with this one's parent, by their folders in /proc."""
    if sys.platform == "linux":
        for entry in _PROC.iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and int(entry.name) != os.getpid():
                    if _state(entry)[1] == os.getppid():
                        yield entry


def _ranks(entry: Path) -> tuple[str | None, ...]:
    """The rank that a process was started as, and its rank on its host."""
    environ = {}
    with suppress(OSError):
        environ = _environ(entry)
    names = ((name, local) for name, local in _RANKS.items() if name in environ)
    return tuple(environ.get(name) for name in next(names, ()))


def _is_alive(entry: Path) -> bool:
    with suppress(OSError):
        return _state(entry)[0] not in "ZX"
    return False


def _state(entry: Path) -> tuple[str, int]:
    """State, "T" for stopped, and parent."""
    # The name, in brackets, may hold anything; state and parent follow it.
    state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
    return state, int(parent)


def _environ(entry: Path) -> dict[str, str]:
    """What a process was started with."""
    pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
