"""What a batch job has done so far, on disk: survives kill -9 and ends as the output file.

    <output>.parts/lock                rank 0's flock: one run of an output at a time
                   manifest.json       which job the parts belong to (`engine/batch/manifest.py`)
                   part-00003.jsonl    records of data rank 3, in the order they finished

A part is append-only, one line a record: {"index": 7, "crc32": 1234, "record": {...}}. All records
that finish in one step go to disk in one write and one fsync (group commit) before anyone counts
them as done. A crash can only damage the end of a part: `scan_part` takes the lines whose checksum
holds, and a torn tail is cut off before anyone appends again. The merge copies bytes by offset, in
input order, and renames: the output is complete or absent.

Worked example: parts "0 2 5" and "1 3 [torn" of a 6-line input. Done: 0 1 2 3 5. The next run, on
any number of ranks, appends 4; merged: 0 1 2 3 4 5.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from engine.batch.atomic_files import Busy, DurableWriter, fsync_directory, lock, write_json
from engine.distributed.health.progress import Tick, no_tick
from engine.request import Completion

_HEAD = re.compile(rb'\{"index": (\d{1,18}), "crc32": (\d{1,10}), "record": ')
_TAIL = b"}\n"
_ERROR_MARK = b'"finish_reason": "error"'  # inside a JSON string its quotes would be escaped
_CHUNK = 1 << 20
_TICK_RECORDS = 4096
_ORPHANS_S = 10.0  # how long ranks of a run that was just killed may take to vanish


def encode(completion: Completion) -> bytes:
    """Return the line of a part that holds a completion's record."""
    record, index = completion.record(), completion.index
    try:
        body = json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair in an id: only an escape can write it
        body = json.dumps(record).encode()
    head = b'{"index": %d, "crc32": %d, "record": ' % (index, _checksum(index, body))
    return head + body + _TAIL


def _checksum(index: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(b"%d" % index))


def scan_part(file: IO[bytes], tick: Tick = no_tick) -> Iterator[tuple[int, int, int]]:
    """Yield (index, offset, length) of a part's whole records; pass over what is torn or damaged.
    tick: called every now and then.

    offset and length, in bytes, are those of the record's JSON without the line around it.
    """
    offset = 0
    for number, line in enumerate(file):
        if number % _TICK_RECORDS == 0:
            tick()
        if (head := _HEAD.match(line)) and line.endswith(_TAIL):
            index, body = int(head[1]), line[head.end() : -len(_TAIL)]
            if _checksum(index, body) == int(head[2]):
                yield index, offset + head.end(), len(body)
        offset += len(line)


class PartWriter:
    """Appends one data rank's records, those that finish together in one write and one fsync."""

    def __init__(self, parts: Path, data_rank: int) -> None:
        """Open the part that `Ledger.create_parts` made. Raises OSError, Busy if still written."""
        self.path = part_path(parts, data_rank)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            lock(self._fd, f"{self.path}: is being written", _ORPHANS_S)
        except Busy:
            os.close(self._fd)
            raise

    def append(self, completions: Iterable[Completion]) -> None:
        """Make the records durable before returning.

        Raises OSError, after which nothing may be appended: the part may end in half a line, which
        only `Ledger.create_parts` cuts off.
        """
        rest = memoryview(b"".join(map(encode, completions)))
        while rest:
            rest = rest[os.write(self._fd, rest) :]
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the part and let go of its lock."""
        os.close(self._fd)


class Ledger:
    """Rank 0's hold on the parts of one output, from the first look to the merge."""

    def __init__(self, output: Path) -> None:
        """Make `<output>.parts` where it is missing and lock it. Raises OSError and Busy."""
        self.output = output
        self.parts = parts_dir(output)
        self._lock_fd = _lock_directory(self.parts)

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._lock_fd)
        # Some network file systems keep the name of a removed file for as long as it is open.
        _remove_empty(self.parts)

    def count(self) -> int:
        """Return how many records the parts hold."""
        num_records = 0
        for path in self._part_files():
            with path.open("rb", buffering=_CHUNK) as file:
                num_records += sum(1 for _ in scan_part(file))
        return num_records

    def start_over(self, manifest: dict[str, Any]) -> None:
        """Discard every record, then begin the job of `manifest`: parts never meet another's."""
        for path in self._part_files():
            path.unlink()
        fsync_directory(self.parts)
        write_json(self.parts / "manifest.json", manifest)

    def create_parts(self, num_data: int) -> None:
        """Cut torn tails off and make the parts of `num_data` ranks. Raises OSError and Busy."""
        for data_rank in range(num_data):
            part_path(self.parts, data_rank).touch()
        for path in self._part_files():
            with path.open("r+b") as file:
                lock(file.fileno(), f"{path}: is being written", _ORPHANS_S)
                _cut_torn_tail(file)
        fsync_directory(self.parts)

    def done(self, num_lines: int, tick: Tick = no_tick) -> np.ndarray:
        """Return which lines have a record: bool [num_lines]. tick: called every now and then."""
        done_n = np.zeros(num_lines, dtype=bool)
        for path in self._part_files():
            with path.open("rb", buffering=_CHUNK) as file:
                records = scan_part(file, tick)
                indices = np.fromiter((index for index, _, _ in records), dtype=np.int64)
            done_n[indices] = True
        return done_n

    def merge(self, lines: range, tick: Tick = no_tick) -> int:
        """Write the records of these requests, in input order, to the output, durably; return how
        many are errors. tick: called every now and then.

        Holds three numbers a record and copies one record at a time. Raises OSError, after which
        the ledger is as it was, and ValueError when a record is missing.
        """
        paths, num_lines = self._part_files(), len(lines)
        part_n = np.full(num_lines, -1, dtype=np.int32)
        offset_n = np.zeros(num_lines, dtype=np.int64)
        length_n = np.zeros(num_lines, dtype=np.int64)
        for number, path in enumerate(paths):
            with path.open("rb", buffering=_CHUNK) as file:
                for index, offset, length in scan_part(file, tick):
                    place = index - lines.start
                    part_n[place], offset_n[place], length_n[place] = number, offset, length
        if (missing := np.flatnonzero(part_n < 0)).size:
            raise ValueError(
                f"{self.parts}: {missing.size} of {num_lines} records are missing, first that of "
                f"request {lines[missing[0]]} (from 0); run the same command again to make them"
            )
        temporary = self.output.with_name(self.output.name + ".tmp")
        parts = [os.open(path, os.O_RDONLY) for path in paths]
        num_errors = 0
        try:
            with temporary.open("wb", buffering=_CHUNK) as file:
                out = DurableWriter(file, tick)
                for place in range(num_lines):
                    if place % _TICK_RECORDS == 0:
                        tick()
                    body = os.pread(parts[part_n[place]], length_n[place], offset_n[place])
                    num_errors += _ERROR_MARK in body
                    out.write(body + b"\n")
                out.sync()
            os.replace(temporary, self.output)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            for fd in parts:
                os.close(fd)
        fsync_directory(self.output.parent)
        return num_errors

    def remove(self) -> None:
        """Remove the parts, once the output stands; the lock goes last, with its directory."""
        for path in [*self._part_files(), *self.parts.glob("manifest.json*"), self.parts / "lock"]:
            path.unlink()
        _remove_empty(self.parts)

    def _part_files(self) -> list[Path]:
        return sorted(self.parts.glob("part-*.jsonl"))


def parts_dir(output: Path) -> Path:
    """Return the directory of an output's parts."""
    return output.with_name(output.name + ".parts")


def part_path(parts: Path, data_rank: int) -> Path:
    """Return the part of one data rank."""
    return parts / f"part-{data_rank:05d}.jsonl"


def _lock_directory(parts: Path) -> int:
    """Lock `parts`, made if need be, and return the open lock file.

    A holder that finishes removes lock and directory, so a lock file counts only while it has its
    name.
    """
    while True:
        parts.mkdir(exist_ok=True)
        try:
            fd = os.open(parts / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the directory is gone again
            continue
        try:
            lock(fd, f"{parts}: the job is being run")
            if os.fstat(fd).st_ino == os.stat(parts / "lock").st_ino:
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _remove_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        pass  # in use again, or not ours to remove: it holds something, or is gone already


def _cut_torn_tail(file: IO[bytes]) -> None:
    """Cut a part after its last line end, so that the next record starts on a line of its own."""
    position = end = file.seek(0, os.SEEK_END)
    while position:
        start = max(0, position - _CHUNK)
        file.seek(start)
        if (found := file.read(position - start).rfind(b"\n")) >= 0:
            position = start + found + 1
            break
        position = start
    if position < end:
        file.truncate(position)
        os.fsync(file.fileno())
