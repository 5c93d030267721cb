"""Ledger shards: the append-only file of one data rank's records, written, locked and read.

One line per record: {"index": 7, "crc32": 1234, "record": {...}}. A crash can only damage the end
of a file: a torn tail is skipped when it is read, and truncated before the next append.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from engine.batch.atomic_files import Busy, fsync_file, lock, naming
from engine.batch.records.json_bytes import own_record
from engine.distributed.health.progress import OnProgress, ignore_progress
from engine.request import Completion

_HEAD = re.compile(rb'\{"index": (\d{1,18}), "crc32": (\d{1,10}), "record": ')
_TAIL = b"}\n"
CHUNK = 1 << 20
RECORDS_PER_REPORT = 4096
_SHARD_LOCK_TIMEOUT_S = 10.0  # for ranks of a run that was just killed to exit

RecordWriter = Callable[[Completion], bytes]  # the record that the output has, without a line end


def shards_dir(output: Path) -> Path:
    """Return the directory of an output's ledger shards."""
    return output.with_name(output.name + ".parts")


def shard_path(directory: Path, data_rank: int) -> Path:
    """Return the ledger shard of one data rank."""
    return directory / f"part-{data_rank:05d}.jsonl"


def encode(completion: Completion, to_record: RecordWriter = own_record) -> bytes:
    """Return the line of a ledger shard that holds a completion's record."""
    return encode_record(completion.index, to_record(completion))


def encode_record(index: int, body: bytes) -> bytes:
    """Return the line of a ledger shard that holds a record as the output has it."""
    head = b'{"index": %d, "crc32": %d, "record": ' % (index, _checksum(index, body))
    return head + body + _TAIL


def _checksum(index: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(b"%d" % index))


def scan_shard(
    file: IO[bytes], report: OnProgress = ignore_progress
) -> Iterator[tuple[int, int, int]]:
    """Yield (index, offset, length) of a ledger shard's whole records; skip torn or damaged ones.

    Offset and length, in bytes, are those of the record's JSON without the line around it.

    Args:
        file: opened for reading.
        report: called once per 4096 lines.
    """
    offset = 0
    for number, line in enumerate(file):
        if number % RECORDS_PER_REPORT == 0:
            report()
        if (head := _HEAD.match(line)) and line.endswith(_TAIL):
            index, body = int(head[1]), line[head.end() : -len(_TAIL)]
            if _checksum(index, body) == int(head[2]):
                yield index, offset + head.end(), len(body)
        offset += len(line)


class ShardWriter:
    """Appends one data rank's records, those that finish together in one write and one fsync."""

    def __init__(self, directory: Path, data_rank: int) -> None:
        """Open the ledger shard of a data rank, which `Ledger.create_shards` has created.

        Raises:
            OSError: it cannot be opened.
            Busy: a rank of an earlier run still holds its lock.
        """
        self.path = shard_path(directory, data_rank)
        self.to_record: RecordWriter = own_record
        self._warns = data_rank == 0  # all shards are on one file system
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            lock_shard(self._fd, self.path, warns=self._warns)
        except (Busy, OSError):
            os.close(self._fd)
            raise

    def append(self, completions: Iterable[Completion]) -> None:
        """Make the records durable before returning.

        Raises OSError, after which nothing may be appended: the shard may end in half a line, which
        only `Ledger.create_shards` truncates.
        """
        rest = memoryview(b"".join(encode(each, self.to_record) for each in completions))
        with naming(self.path):
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        fsync_file(self._fd, self.path, warns=self._warns)

    def close(self) -> None:
        """Close the ledger shard and release its lock. Raises OSError."""
        with naming(self.path):
            os.close(self._fd)


def lock_shard(fd: int, path: Path, *, warns: bool = True) -> None:
    """Lock an open ledger shard. Raises Busy, and OSError as `lock` does."""
    lock(fd, f"{path}: is being written", _SHARD_LOCK_TIMEOUT_S, warns=warns)


def read_record(fd: int, path: Path, length: int, offset: int) -> bytes:
    """Return a part of a file: network file systems may answer a read with less than asked for."""
    with naming(path):
        body = os.pread(fd, length, offset)
        while len(body) < length:
            more = os.pread(fd, length - len(body), offset + len(body))
            if not more:
                raise OSError(errno.EIO, "was truncated while it was read")
            body += more
    return body


def truncate_torn_tail(file: IO[bytes]) -> None:
    """Truncate a ledger shard after its last line end, so that the next record starts a line."""
    position = end = file.seek(0, os.SEEK_END)
    while position:
        start = max(0, position - CHUNK)
        file.seek(start)
        if (found := file.read(position - start).rfind(b"\n")) >= 0:
            position = start + found + 1
            break
        position = start
    if position < end:
        file.truncate(position)
        fsync_file(file.fileno(), file.name)
