"""The lock of a ledger: one run per output at a time, though its directory comes and goes."""

from __future__ import annotations

import os
from pathlib import Path

from engine.batch.atomic_files import Busy, lock, warn_of_missing

_LOCK_ATTEMPTS = 100  # runs that end while this one begins are few


def lock_directory(directory: Path) -> int:
    """Lock `directory`, created if missing, and return the open lock file.

    A holder that finishes removes lock file and directory, so a lock counts only while the locked
    file still has its name.
    """
    path = directory / "lock"
    for attempt in range(_LOCK_ATTEMPTS + 1):
        directory.mkdir(exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the directory was removed in between
            if attempt == _LOCK_ATTEMPTS:
                raise
            continue
        try:
            lock(fd, f"{directory}: the job is being run")
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                return fd
            if attempt == _LOCK_ATTEMPTS:
                warn_of_missing(
                    directory,
                    "the inode number of a file changes on this file system; a second run of the "
                    "same output may not be detected: do not start two",
                )
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise Busy(f"{directory}: other processes keep removing it; use another --output")


def remove_empty(directory: Path) -> None:
    """Remove a directory that is empty; leave any other as it is."""
    try:
        directory.rmdir()
    except OSError:
        pass  # it is in use again, holds other files, or is removed already
