"""File systems that lack syncs, locks or stable inode numbers, and errors that name their file.

Network and user-space file systems answer with error numbers of their own; these tests put them in
place of the kernel's answers.
"""

import errno
import fcntl
import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine.batch import atomic_files
from engine.batch.atomic_files import (
    Busy,
    DurableWriter,
    fsync_directory,
    lock,
    read_json,
    write_text,
)
from engine.batch.input.index import scan_input
from engine.batch.input.pending import PendingLines
from engine.batch.ledger import Ledger, ShardWriter, shards_dir
from engine.batch.on_rank_0 import describe
from engine.request import Completion

UNSUPPORTED = [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOTTY]
DENIED = [errno.EBADF, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ENXIO]
REAL = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE]


@pytest.fixture(autouse=True)
def _each_test_warns_anew(monkeypatch):
    monkeypatch.setattr(atomic_files, "_warned", set(), raising=False)


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def fail_sync(monkeypatch, code: int, *, of_directories: bool) -> None:
    sync = os.fsync

    def failing(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) == of_directories:
            raise failure(code)
        sync(fd)

    monkeypatch.setattr(os, "fsync", failing)


def fail_locks(monkeypatch, code: int, *names: str) -> None:
    def failing(*arguments: object) -> None:
        raise failure(code)

    for name in names:
        monkeypatch.setattr(fcntl, name, failing)


def completion(index: int) -> Completion:
    return Completion(index, index, "x", [1], "stop", prompt_tokens=1, completion_tokens=1)


def run_job(output: Path) -> None:
    """Write, resume and merge a ledger of two records."""
    for index in range(2):
        ledger = Ledger(output)
        if index == 0:
            ledger.start_over({"version": 1})
        ledger.create_shards(1)
        writer = ShardWriter(ledger.directory, 0)
        writer.append([completion(index)])
        writer.close()
        if index == 1:
            assert ledger.done(2).all()
            ledger.merge(range(2))
            ledger.remove()
        ledger.close()
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [0, 1]
    assert not shards_dir(output).exists()


@pytest.mark.parametrize("code", UNSUPPORTED + DENIED)
def test_directories_that_cannot_be_synced_are_named_once_and_the_job_goes_on(
    tmp_path, monkeypatch, caplog, code
):
    fail_sync(monkeypatch, code, of_directories=True)
    output = tmp_path / "out.jsonl"
    run_job(output)
    messages = [record.getMessage() for record in caplog.records]
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert len(messages) == 2, messages  # the ledger's directory and the output's
    for message, folder in zip(messages, (shards_dir(output), tmp_path), strict=True):
        assert message.startswith(f"{folder}: ") and os.strerror(code) in message


def test_a_directory_that_cannot_be_opened_is_not_synced(tmp_path, monkeypatch, caplog):
    opened = os.open

    def failing(path, *arguments):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", failing)
    fsync_directory(tmp_path)
    assert str(tmp_path) in caplog.text and "Permission denied" in caplog.text


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_a_directory_that_is_full_or_gone_ends_the_job_by_its_name(tmp_path, monkeypatch, code):
    fail_sync(monkeypatch, code, of_directories=True)
    with pytest.raises(OSError) as caught:
        fsync_directory(tmp_path)
    assert describe(caught.value).startswith(f"{tmp_path}: {os.strerror(code)}")
    with pytest.raises(FileNotFoundError):
        fsync_directory(tmp_path / "none")


@pytest.mark.parametrize("code", UNSUPPORTED)
def test_files_that_cannot_be_synced_are_reported_once_and_the_job_goes_on(
    tmp_path, monkeypatch, caplog, code
):
    fail_sync(monkeypatch, code, of_directories=False)
    run_job(tmp_path / "out.jsonl")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all("power failure" in message for message in messages)


@pytest.mark.parametrize("code", REAL)
def test_a_sync_that_lost_data_names_the_file(tmp_path, monkeypatch, code):
    ledger = Ledger(tmp_path / "out.jsonl")
    ledger.create_shards(1)
    writer = ShardWriter(ledger.directory, 0)
    fail_sync(monkeypatch, code, of_directories=False)
    with pytest.raises(OSError) as caught:
        writer.append([completion(0)])
    assert describe(caught.value).startswith(f"{writer.path}: {os.strerror(code)}")
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "a", "x")
    assert describe(caught.value).startswith(f"{tmp_path / 'a.tmp'}: {os.strerror(code)}")
    with (tmp_path / "b").open("wb") as file, pytest.raises(OSError) as caught:
        DurableWriter(file, lambda: None).sync()
    assert describe(caught.value).startswith(f"{tmp_path / 'b'}: {os.strerror(code)}")


@pytest.mark.parametrize("code", UNSUPPORTED + DENIED + [errno.ENOLCK, errno.EREMOTEIO])
def test_without_flock_posix_locks_exclude_other_processes(tmp_path, monkeypatch, caplog, code):
    fail_locks(monkeypatch, code, "flock")
    path = tmp_path / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    lock(fd, "it is held")
    if (child := os.fork()) == 0:
        try:
            lock(os.open(path, os.O_RDWR), "it is held")
            os._exit(1)
        except Busy:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(fd)
    assert caplog.text.count(f"{tmp_path}: ") == 1 and os.strerror(code) in caplog.text


@pytest.mark.parametrize("code", [*UNSUPPORTED, errno.EBADF, errno.EIO, errno.ENOLCK, errno.EPERM])
def test_without_any_locks_the_job_goes_on_and_says_so_once(tmp_path, monkeypatch, caplog, code):
    fail_locks(monkeypatch, code, "flock", "lockf")
    run_job(tmp_path / "out.jsonl")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0].startswith(f"{shards_dir(tmp_path / 'out.jsonl')}: ")
    assert "do not start two" in messages[0]


def test_a_denied_posix_lock_is_held_by_another_process(tmp_path, monkeypatch):
    fail_locks(monkeypatch, errno.EACCES, "flock", "lockf")
    with pytest.raises(Busy, match="by another process"):
        Ledger(tmp_path / "out.jsonl")


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ENOSPC, errno.ENOTCONN])
def test_a_lock_that_fails_for_another_reason_names_the_file(tmp_path, monkeypatch, code):
    fail_locks(monkeypatch, code, "flock", "lockf")
    with pytest.raises(OSError) as caught:
        Ledger(tmp_path / "out.jsonl")
    path = shards_dir(tmp_path / "out.jsonl") / "lock"
    assert describe(caught.value).startswith(f"{path}: {os.strerror(code)}")


def test_inode_numbers_that_change_do_not_hang_the_job(tmp_path, monkeypatch, caplog):
    found, numbers = os.stat, iter(range(1 << 30, 1 << 31))

    def changing(path, **options):
        result = found(path, **options)
        if str(path).endswith("lock"):
            return os.stat_result((result[0], next(numbers), *result[2:]))
        return result

    monkeypatch.setattr(os, "stat", changing)
    Ledger(tmp_path / "out.jsonl").close()
    assert str(shards_dir(tmp_path / "out.jsonl")) in caplog.text and "inode" in caplog.text


def test_records_that_are_read_in_pieces_are_merged_whole(tmp_path, monkeypatch):
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: read(fd, min(size, 7), offset))
    run_job(tmp_path / "out.jsonl")


class Unreadable:
    """Passes everything on to a file, except reads."""

    def __init__(self, file) -> None:
        self._file = file

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def __iter__(self):
        return self

    def _fail(self, *arguments: object):
        raise failure(errno.EIO)

    __next__ = read = readline = _fail


@pytest.mark.parametrize("place", ["scan", "line", "ledger", "json"])
def test_a_read_that_fails_names_the_file(tmp_path, monkeypatch, place):
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": 1}\n')
    index = scan_input(path)
    ledger = Ledger(tmp_path / "out.jsonl")
    ledger.create_shards(1)
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: Unreadable(opened(self, *a, **k)))

    def first_line() -> None:
        table = PendingLines.select(index, np.zeros(1, dtype=bool))
        PendingLines(path, table)[0]

    work: dict[str, tuple[Path, Callable[[], object]]] = {
        "scan": (path, lambda: scan_input(path)),
        "line": (path, first_line),
        "ledger": (ledger.directory / "part-00000.jsonl", lambda: ledger.done(1)),
        "json": (path, lambda: read_json(path)),
    }
    named, read = work[place]
    with pytest.raises(OSError) as caught:
        read()
    assert describe(caught.value).startswith(f"{named}: {os.strerror(errno.EIO)}")


def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "a.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "a", "x")
    assert describe(caught.value).startswith(f"{tmp_path / 'a.tmp'}: No space left on device")
    (tmp_path / "out.jsonl.parts").mkdir()
    (tmp_path / "out.jsonl.parts/part-00000.jsonl").symlink_to("/dev/full")
    writer = ShardWriter(tmp_path / "out.jsonl.parts", 0)
    with pytest.raises(OSError) as caught:
        writer.append([completion(0)])
    assert describe(caught.value).startswith(f"{writer.path}: No space left on device")
