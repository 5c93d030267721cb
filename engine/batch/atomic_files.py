"""Files that survive a crash: written whole or not at all, and locked to one process.

No module of this folder is imported here; the ledger and the job's other files are written with it.
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
    """Another process has locked the file."""


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
    """Replace a file by `value` as JSON, durably as `write_text` does. Raises OSError."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, None without a file. Raises ValueError otherwise."""
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
    """Writes a large file with an fsync at regular intervals instead of one at the end.

    A single fsync of all of it may take minutes, during which the process looks like a hang.
    """

    def __init__(self, file: IO[bytes], report: Callable[[], None], every: int = 256 << 20) -> None:
        """Wrap an open file.

        Args:
            file: opened for writing.
            report: called after each fsync.
            every: bytes between two of them.
        """
        self._file, self._report, self._every = file, report, every
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
        self._report()


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable: files created, renamed or removed there."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(fd: int, what: str, timeout_s: float = 0) -> None:
    """Lock an open file for this process until it is closed.

    On a file system without locks this does nothing: no other process can be excluded there.

    Args:
        fd: the file.
        what: begins the error message, as in `FILE: is being written`.
        timeout_s: how long to retry, as ranks of a run that was just killed may still hold it.

    Raises:
        Busy: another process holds the lock after `timeout_s`.
        OSError: the file cannot be locked for another reason.
    """
    deadline = time.monotonic() + timeout_s
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
