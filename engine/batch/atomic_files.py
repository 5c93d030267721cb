"""Files that survive a crash: written whole or not at all, and locked to one process.

No module of this folder is imported here; the ledger and the job's other files are written with it.

Network and user-space file systems may lack syncs and locks, and answer with error numbers of their
own. The job goes on where nothing is lost as long as the machine runs, and a warning says once per
folder what is not guaranteed there. Every OSError names its file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)
# The file system has no sync for files. Any other error of a sync means that data is lost.
_NO_FILE_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY)
# The disk is full or the file gone. Any other error, of the sync of a directory or of a lock, is an
# answer to what a file system does not support; a broken disk fails the syncs of files too.
_FULL_OR_GONE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ESTALE,
    errno.ENOTCONN,  # the process of a user-space file system has ended
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
)
_SYNC_LOST = "a power failure may lose"
_warned: set[tuple[str, str]] = set()  # folder and what is missing there


class Busy(ValueError):
    """Another process has locked the file."""


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Name the file in an OSError that names none, such as those of read, write and sync."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file durably: it holds the old text or the new, never half. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    with naming(temporary), temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        fsync_file(file.fileno(), temporary)
    os.replace(temporary, path)
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by `value` as JSON, durably as `write_text` does. Raises OSError."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, None without a file. Raises ValueError otherwise."""
    try:
        with naming(path):
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
        self.crc32 = 0  # of all that was written

    def write(self, data: bytes) -> None:
        """Append. Raises OSError."""
        with naming(self._file.name):
            self._file.write(data)
        self.crc32 = zlib.crc32(data, self.crc32)
        self._unsynced += len(data)
        if self._unsynced >= self._every:
            self.sync()

    def sync(self) -> None:
        """Make durable what was written so far. Raises OSError."""
        with naming(self._file.name):
            self._file.flush()
        fsync_file(self._file.fileno(), self._file.name)
        self._unsynced = 0
        self._report()


def fsync_file(fd: int, path: Path | str, *, warns: bool = True) -> None:
    """Make the content of an open file durable, where the file system can.

    Args:
        fd: the file.
        path: its name, for messages.
        warns: whether a warning says so where it cannot.

    Raises:
        OSError: what was written may be lost.
    """
    with naming(path):
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in _NO_FILE_SYNC:
                raise
            if warns:
                what = "this file system does not sync files"
                _warn_once(Path(path).parent, what, error, f"{_SYNC_LOST} finished records")


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable: files created, renamed or removed there.

    Where the file system cannot, a power failure may undo them; a killed process loses nothing.

    Raises:
        OSError: the disk is full, or the directory is gone.
    """
    with naming(path):
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in _FULL_OR_GONE:
                raise
            what = "this file system does not sync directories"
            _warn_once(path, what, error, f"{_SYNC_LOST} the newest files")


def lock(fd: int, what: str, timeout_s: float = 0, *, warns: bool = True) -> None:
    """Lock an open file for this process until it is closed.

    Where the file system lacks flock, with a POSIX lock. That one is released by closing any of the
    process's open files of that name: open it once. Where it has neither, this does nothing: no
    other process can be excluded there.

    Args:
        fd: the file.
        what: begins the error message, as in `FILE: is being written`.
        timeout_s: how long to retry, as ranks of a run that was just killed may still hold it.
        warns: whether a warning says so where the file system lacks locks.

    Raises:
        Busy: another process holds the lock after `timeout_s`.
        OSError: the file cannot be locked for another reason.
    """
    deadline = time.monotonic() + timeout_s
    while not _try_lock(fd, warns):
        if time.monotonic() >= deadline:
            raise Busy(f"{what} by another process: wait for it, end it, or use another --output")
        time.sleep(0.05)


def _try_lock(fd: int, warns: bool) -> bool:
    """Return whether the file is locked, or no lock can be had; False: another process has it."""
    path = _path_of(fd)
    with naming(path):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            # Only writable files are locked: EBADF for another one is a defect.
            is_writable = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)
            if error.errno in _FULL_OR_GONE or (error.errno == errno.EBADF and not is_writable):
                raise
            missing = error
        found = "POSIX locks are used, which may not reach other hosts: do not start two runs there"
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # both mean that it is held
                return False
            if error.errno in _FULL_OR_GONE:
                raise
            found = "a second run of the same output is not detected: do not start two"
    if warns:
        _warn_once(path.parent, "this file system does not lock files", missing, found)
    return True


def _path_of(fd: int) -> Path:
    try:
        return Path(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        return Path(f"file {fd}")


def warn_of_missing(folder: Path, what: str) -> None:
    """Warn once per folder and process of something that its file system does not guarantee."""
    key = (os.path.abspath(folder), what)
    if key not in _warned:
        _warned.add(key)
        logger.warning("%s: %s", *key)


def _warn_once(folder: Path, what: str, error: OSError, effect: str) -> None:
    warn_of_missing(folder, f"{what} ({error.strerror}); {effect}")
