"""Files are whole or absent, and a lock excludes other processes until it is released."""

import errno
import fcntl
import os

import pytest

from engine.batch.atomic_files import Busy, lock, read_json, write_json, write_text


def test_what_is_written_reads_back_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": "é"})
    write_json(path, {"x": [1, None]})
    assert read_json(path) == {"x": [1, None]}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_dies_midway_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_a_file_is_synced_before_it_gets_its_name_and_the_directory_after(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace

    def synced(fd: int) -> None:
        order.append("directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        sync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: order.append("name") or replace(*paths))
    write_text(tmp_path / "a", "x")
    assert order == ["file", "name", "directory"]


def test_no_file_is_no_value_and_anything_else_is_named(tmp_path):
    assert read_json(tmp_path / "none.json") is None
    for content in (b"", b"{", b"[]", b"\xff"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.json: is damaged"):
            read_json(tmp_path / "bad.json")


def test_a_lock_holds_until_its_file_is_closed(tmp_path):
    path = tmp_path / "lock"
    first, second = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    lock(first, "it is held")
    with pytest.raises(Busy, match="^it is held by another process"):
        lock(second, "it is held")
    os.close(first)
    lock(second, "it is held")
    os.close(second)


def test_a_lock_whose_holder_exits_within_the_timeout_raises_no_error(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    first, second = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    lock(first, "it")
    monkeypatch.setattr("engine.batch.atomic_files.time.sleep", lambda seconds: os.close(first))
    lock(second, "it", timeout_s=60)
    os.close(second)


def test_a_file_system_without_locks_is_no_error_and_other_errors_are(tmp_path, monkeypatch):
    def fail(code: int):
        return lambda fd, mode: (_ for _ in ()).throw(OSError(code, os.strerror(code)))

    monkeypatch.setattr(fcntl, "flock", fail(errno.ENOLCK))
    lock(0, "it")
    monkeypatch.setattr(fcntl, "flock", fail(errno.EBADF))
    with pytest.raises(OSError, match="Bad file descriptor"):
        lock(0, "it")
