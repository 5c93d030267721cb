"""Runs one part of tools/gpu_suite.py in a process of its own, within its time.

    python -m gpu_checks.worker PART FILE DEVICE FAMILIES [tiny]

The process writes each check as a line of JSON when it is known, so a part that is stopped keeps
what it has found. Every process that a part starts inherits a mark in its environment, by which all
of them are found and ended, whatever sessions they have.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from bench.candidate import REPOSITORY, TOOLS
from chaos.processes import send, wait_until_gone

from gpu_checks.check import Check, Settings

MARK = "LOCKSTEP_GPU_SUITE"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a part's process found."""

    checks: list[Check]
    seconds: float
    is_whole: bool  # it came to its end


def run_part(
    name: str,
    settings: Settings,
    limit_s: float,
    log: Path | None = None,
    mark: str | None = None,
) -> Outcome:
    """Run a part; stop it, and whatever it has started, after `limit_s`.

    Args:
        log: file for its output; None: that of this process's errors.
        mark: of its processes; None: a new one.
    """
    mark, began = mark or uuid.uuid4().hex, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder:
        file = Path(folder, "checks")
        file.touch()
        command = [sys.executable, "-m", "gpu_checks.worker", name, str(file)]
        command += [settings.device.type, ",".join(settings.families)]
        command += ["tiny"] if settings.is_tiny else []
        roots = [str(TOOLS), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, MARK: mark, "PYTHONPATH": os.pathsep.join(roots)}
        environment["TMPDIR"] = folder  # what a stopped part leaves ends with the folder
        with log.open("ab") if log is not None else open(os.devnull, "wb") as out:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out if log is not None else sys.stderr.fileno(),
                stderr=subprocess.STDOUT,
            )
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_marked(MARK, mark)
                process.wait()
        checks = list(_read(file))
    seconds = time.monotonic() - began
    if code != 0:
        why = f"stopped after {seconds:.0f} s" if code is None else f"exit code {code}"
        checks.append(Check(group=name, name="the part's end", passed=False, note=why))
    return Outcome(checks, seconds, code is not None)


def marked(name: str, mark: str) -> list[int]:
    """Return the processes, but this one, whose environment has a variable of this value."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):  # it has ended, or is another user's
            if f"{name}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def end_marked(name: str, mark: str, within_s: float = 10.0) -> None:
    """Kill these processes, and those that they start meanwhile."""
    deadline = time.monotonic() + within_s
    while (pids := marked(name, mark)) and time.monotonic() < deadline:
        for pid in pids:
            send(pid, signal.SIGKILL)
        wait_until_gone(pids, 1.0)


def _read(file: Path) -> Iterator[Check]:
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # the last line of a process that was killed
            yield Check(**json.loads(line))


def main(argv: Sequence[str]) -> None:
    """Run a part in this process."""
    from gpu_checks.parts import PARTS

    name, file, device, families, *rest = argv
    settings = Settings(
        device=torch.device(device), families=tuple(families.split(",")), is_tiny=bool(rest)
    )
    with Path(file).open("a", encoding="utf-8") as out:
        for check in PARTS[name].run(settings):
            print(json.dumps(check.plain(), allow_nan=False), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
