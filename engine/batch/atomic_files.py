"""Files that survive a crash: written whole or not at all, and locked to one process.

A leaf; the batch job and its ledger stand on it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class Busy(ValueError):
    """Another process holds the file."""


def write_text(path: Path, text: str) -> None:
    """Replace a file durably: it holds the old text or the new, never half. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, for a value."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read an object, None where there is no file. Raises ValueError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: is damaged ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is damaged (must hold a JSON object)")
    return value


class DurableWriter:
    """Writes a large file that is on disk at the end, without leaving all of it for the last
    moment: a disk may need minutes for what is in memory, and nobody could tell that from a hang.

    tick: called whenever a part is on disk.
    """

    def __init__(self, file: IO[bytes], tick: Callable[[], None], every: int = 256 << 20) -> None:
        self._file, self._tick, self._every = file, tick, every
        self._unsynced = 0

    def write(self, data: bytes) -> None:
        """Append. Raises OSError."""
        self._file.write(data)
        self._unsynced += len(data)
        if self._unsynced >= self._every:
            self.sync()

    def sync(self) -> None:
        """Make durable what was written so far. Raises OSError."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsynced = 0
        self._tick()


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable: files made, renamed or removed there."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(fd: int, what: str, patience_s: float = 0) -> None:
    """Lock an open file for this process until it is closed; raise Busy after `patience_s`.

    Patience is for ranks of a run that was killed a moment ago. On a file system without locks
    nobody can be kept out, and the job goes on.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise Busy(
                    f"{what} by another process: wait for it, end it, or use another --output"
                ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise
        time.sleep(0.05)
