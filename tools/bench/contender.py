"""Contenders: what a bench compares, each a worker process (one a rank) that stays loaded.

    contender = Contender(name="mine", module="bench.workers.NAME", python=sys.executable)
    with start(contender) as running:
        replies = running.call("load", checkpoint="...")   # one dict a rank

All contenders of a bench are started before the first is timed, so that runs can alternate between
them without reloading anything; a worker that waits sleeps in a socket read and costs no CPU.
"""

from __future__ import annotations

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
class Contender:
    """One row of a bench's table.

    module: the worker, run as `python -m MODULE`. python: its environment's interpreter. ranks:
    above 1 it is started by torchrun. threads: CPU threads a rank. load: keywords of the worker's
    `load`. needs_engine: whether the repository root is on its module path. root: the checkout
    whose tools and engine it imports, and its working directory; None: this one.
    """

    name: str
    module: str
    python: str
    ranks: int = 1
    threads: int = 1
    load: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    needs_engine: bool = False
    root: Path | None = None

    def command(self, socket_path: str) -> list[str]:
        """The command line that starts this contender's worker, all ranks of it."""
        target = ["-m", self.module, socket_path]
        if self.ranks == 1:
            return [self.python, *target]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        return [self.python, *launcher, str(self.ranks), *target]

    def environment(self) -> dict[str, str]:
        """The worker's environment: this one's, its thread count, and where its modules are."""
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
    """A started contender: its ranks' sockets and its log."""

    def __init__(
        self, contender: Contender, process: subprocess.Popen[bytes], log: Path, timeout_s: float
    ) -> None:
        self.contender = contender
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
        while len(found) < self.contender.ranks:
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
        """Ask every rank for `method` at once; return their replies by rank.

        Raises:
            WorkerError: a rank raised, died or gave no answer within the time limit.
        """
        line = json.dumps({"do": method, **arguments}) + "\n"
        try:
            for stream in self._streams:
                stream.write(line)
                stream.flush()
            return [self._answer(stream, method) for stream in self._streams]
        except OSError as error:  # among them TimeoutError
            raise self._failure(f"gave no answer to {method!r} ({error})") from error

    def close(self) -> None:
        """End all processes of this contender."""
        for stream in self._streams:
            with contextlib.suppress(OSError):
                stream.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)

    def _answer(self, stream: TextIO, method: str) -> dict[str, Any]:
        answer = stream.readline()
        if not answer:
            raise self._failure(f"died in {method!r}")
        reply = json.loads(answer)
        if "error" in reply:
            raise WorkerError(f"{self.contender.name}: {method!r} failed\n{reply['error']}")
        return reply

    def _failure(self, what: str) -> WorkerError:
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-25:])
        return WorkerError(f"{self.contender.name}: the worker {what}; the end of its log:\n{tail}")


@contextlib.contextmanager
def start(contender: Contender, timeout_s: float = 600.0) -> Iterator[Running]:
    """Start a contender's worker; on leaving, end every process of it.

    timeout_s bounds the start and each later answer.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path, log = f"{folder}/socket", Path(folder, "log")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, log.open("wb") as out:
            listener.bind(path)
            listener.listen(contender.ranks)
            process = subprocess.Popen(
                contender.command(path),
                env=contender.environment(),
                cwd=contender.root,  # `python -m` searches it before PYTHONPATH
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that torchrun and its ranks end together
            )
            running = Running(contender, process, log, timeout_s)
            try:
                running.accept(listener)
                yield running
            finally:
                running.close()


def select(found: Sequence[Contender], names: Sequence[str] | None) -> list[Contender]:
    """The contenders of these names in this order; all of them for None.

    Raises:
        ValueError: a name that nobody has.
    """
    if names is None:
        return list(found)
    by_name = {contender.name: contender for contender in found}
    if missing := [name for name in names if name not in by_name]:
        raise ValueError(
            f"--contenders: {', '.join(missing)} cannot take part here; choose from "
            f"{', '.join(by_name)} (a peer takes part when --help's conditions are met)"
        )
    return [by_name[name] for name in names]
