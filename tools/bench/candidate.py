"""Candidates: what a bench compares, each a worker process (one per rank) that stays loaded.

    candidate = Candidate(name="mine", module="bench.workers.NAME", python=sys.executable)
    with start(candidate) as running:
        replies = running.call("load", checkpoint="...")   # one dict per rank

All candidates of a bench are started before the first is timed, so that runs can alternate between
them without reloading anything; a worker that waits sleeps in a socket read and costs no CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

TOOLS = Path(__file__).resolve().parent.parent
REPOSITORY = TOOLS.parent


class WorkerError(RuntimeError):
    """A worker died, timed out or raised; the message holds the end of its log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One row of a bench's table."""

    name: str
    module: str  # the worker, run as `python -m MODULE`
    python: str  # interpreter of its environment
    ranks: int = 1  # above 1 it is started by torchrun
    threads: int = 1  # CPU threads per rank
    load: dict[str, Any] = field(default_factory=dict)  # keywords of the worker's `load`
    env: dict[str, str] = field(default_factory=dict)
    needs_engine: bool = False  # whether the repository root is on its module path
    root: Path | None = None  # checkout of its tools and engine, its working directory; None: this

    def command(self, socket_path: str) -> list[str]:
        """Return the command line that starts all ranks of this candidate's worker."""
        target = ["-m", self.module, socket_path]
        if self.ranks == 1:
            return [self.python, *target]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        return [self.python, *launcher, str(self.ranks), *target]

    def environment(self) -> dict[str, str]:
        """Return the worker's environment: this one's, its thread count and its module path."""
        # Only the engine's own worker sees the repository root: the folder kernels/ there would
        # otherwise be importable in environments that have a package of that name.
        root = self.root or REPOSITORY
        roots = [str(root / "tools")] + ([str(root)] if self.needs_engine else [])
        if inherited := os.environ.get("PYTHONPATH"):
            roots.append(inherited)
        return {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **self.env,
            "PYTHONPATH": os.pathsep.join(roots),
        }


class Running:
    """A started candidate: its ranks' sockets and its log."""

    def __init__(
        self, candidate: Candidate, process: subprocess.Popen[bytes], log: Path, timeout_s: float
    ) -> None:
        self.candidate = candidate
        self.pids: list[int] = []
        self._process = process
        self._log = log
        self._timeout_s = timeout_s
        self._streams: list[TextIO] = []

    def accept(self, listener: socket.socket) -> None:
        """Wait until every rank has connected."""
        deadline = time.monotonic() + self._timeout_s
        found: dict[int, tuple[TextIO, int]] = {}
        listener.settimeout(0.5)
        while len(found) < self.candidate.ranks:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise self._failure("did not start")
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                connection.settimeout(self._timeout_s)
                stream = connection.makefile("rw", encoding="utf-8")
                hello = json.loads(stream.readline())
                found[hello["rank"]] = stream, hello["pid"]
        self._streams = [found[rank][0] for rank in sorted(found)]
        self.pids = [found[rank][1] for rank in sorted(found)]

    def call(self, method: str, **arguments: Any) -> list[dict[str, Any]]:
        """Call `method` on every rank at once; return the replies by rank.

        Raises:
            WorkerError: a rank raised, died or did not reply within the time limit.
        """
        line = json.dumps({"do": method, **arguments}) + "\n"
        try:
            for stream in self._streams:
                stream.write(line)
                stream.flush()
            return [self._reply(stream, method) for stream in self._streams]
        except OSError as error:  # among them TimeoutError
            raise self._failure(f"did not reply to {method!r} ({error})") from error

    def close(self) -> None:
        """End all processes of this candidate."""
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)

    def _reply(self, stream: TextIO, method: str) -> dict[str, Any]:
        line = stream.readline()
        if not line:
            raise self._failure(f"died in {method!r}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.candidate.name}: {method!r} failed\n{reply['error']}")
        return reply

    def _failure(self, what: str) -> WorkerError:
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])
        return WorkerError(f"{self.candidate.name}: the worker {what}; the end of its log:\n{tail}")


@contextlib.contextmanager
def start(candidate: Candidate, timeout_s: float = 600.0) -> Iterator[Running]:
    """Start a candidate's worker; on leaving, end every process of it.

    Args:
        timeout_s: for the start and for each later reply.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path, log = f"{folder}/socket", Path(folder, "log")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, log.open("wb") as out:
            listener.bind(path)
            listener.listen(candidate.ranks)
            process = subprocess.Popen(
                candidate.command(path),
                env=candidate.environment(),
                cwd=candidate.root,  # `python -m` searches it before PYTHONPATH
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that torchrun and its ranks end together
            )
            running = Running(candidate, process, log, timeout_s)
            try:
                running.accept(listener)
                yield running
            finally:
                running.close()


def add_candidates_option(parser: argparse.ArgumentParser) -> None:
    """Add --candidates A,B, of which `select` takes the value; --contenders is its former name."""
    names: Any = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--candidates", type=names, metavar="A,B")
    former: Any = {"dest": "candidates", "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--contenders", type=names, **former)


def select(found: Sequence[Candidate], names: Sequence[str] | None) -> list[Candidate]:
    """Return the candidates of these names in this order; all of them for None.

    Raises:
        ValueError: no candidate has that name.
    """
    if names is None:
        return list(found)
    by_name = {candidate.name: candidate for candidate in found}
    if missing := [name for name in names if name not in by_name]:
        raise ValueError(
            f"--candidates: {', '.join(missing)} cannot run here; choose from "
            f"{', '.join(by_name)} (a peer runs where the conditions in --help hold)"
        )
    return [by_name[name] for name in names]
