"""Ledger: the records a batch job has completed, on disk; survives kill -9, ends as the output.

    <output>.parts/lock                rank 0's flock: one run per output at a time
                   manifest.json       which job the ledger shards belong to (`manifest.py`)
                   part-00003.jsonl    ledger shard of data rank 3: records in completion order

A ledger shard is append-only, one line per record: {"index": 7, "crc32": 1234, "record": {...}}.
All records that finish in one step go to disk in one write and one fsync (group commit) before they
count as done. A crash can only damage the end of a ledger shard: `scan_shard` takes the lines whose
checksum holds, and a torn tail is truncated before the next append. The merge copies bytes by
offset, in input order, and renames: the output is complete or absent.

Worked example: ledger shards "0 2 5" and "1 3 [torn" of a 6-line input. Done: 0 1 2 3 5. The next
run, on any number of ranks, appends 4; merged: 0 1 2 3 4 5.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engine.batch.atomic_files import DurableWriter, fsync_directory, naming, write_json
from engine.batch.ledger.directory_lock import lock_directory, remove_empty
from engine.batch.ledger.shard_file import (
    CHUNK,
    RECORDS_PER_REPORT,
    lock_shard,
    read_record,
    scan_shard,
    shard_path,
    shards_dir,
    truncate_torn_tail,
)
from engine.batch.records.marks import is_error
from engine.distributed.health.progress import OnProgress, ignore_progress


class Ledger:
    """The ledger shards of one output, locked; held by rank 0 from start to merge."""

    def __init__(self, output: Path) -> None:
        """Create `<output>.parts` where it is missing and lock it. Raises OSError and Busy."""
        self.output = output
        self.directory = shards_dir(output)
        self.void_before: dict[str, int] = {}  # ledger shard -> byte offset; error records before
        # it do not count, as their lines are to run again (`retry_rounds.py`)
        self.error_file: Path | None = None  # where `merge` writes error records; None: the output
        self.output_crc32: int | None = None  # of what `merge` has written
        self.error_crc32 = 0
        self._lock_fd = lock_directory(self.directory)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock_fd)
        # Some network file systems keep the name of a removed file for as long as it is open.
        remove_empty(self.directory)

    def count(self) -> int:
        """Return how many records the ledger holds."""
        num_records = 0
        for path in self._shard_files():
            with naming(path), path.open("rb", buffering=CHUNK) as file:
                num_records += sum(1 for _ in scan_shard(file))
        return num_records

    def count_errors(self, report: OnProgress = ignore_progress) -> int:
        """Return how many lines have an error record.

        Args:
            report: called once per 4096 records.

        Raises:
            OSError: a file cannot be read.
        """
        errors: set[int] = set()
        for path in self._shard_files():
            with naming(path), path.open("rb", buffering=CHUNK) as file:
                for index, offset, length in scan_shard(file, report):
                    if is_error(read_record(file.fileno(), path, length, offset)):
                        errors.add(index)
        return len(errors)

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each ledger shard, by the name of its file. Raises OSError."""
        return {path.name: path.stat().st_size for path in self._shard_files()}

    def discard(self) -> None:
        """Remove records and manifest; the lock stays. Raises OSError."""
        for path in [*self._shard_files(), *self.directory.glob("manifest.json*")]:
            path.unlink()
        fsync_directory(self.directory)

    def start_over(self, manifest: dict[str, Any]) -> None:
        """Discard every record, then begin the job of `manifest`: never two jobs' records at once.

        Raises OSError.
        """
        for path in self._shard_files():
            path.unlink()
        fsync_directory(self.directory)
        write_json(self.directory / "manifest.json", manifest)

    def create_shards(self, num_data: int) -> None:
        """Truncate torn tails and create the shards of `num_data` ranks. Raises OSError, Busy."""
        for data_rank in range(num_data):
            shard_path(self.directory, data_rank).touch()
        for path in self._shard_files():
            with naming(path), path.open("r+b") as file:
                lock_shard(file.fileno(), path)
                truncate_torn_tail(file)
        fsync_directory(self.directory)

    def done(self, num_lines: int, report: OnProgress = ignore_progress) -> np.ndarray:
        """Return which lines have a record: bool [num_lines].

        Args:
            num_lines: of the whole input.
            report: called once per 4096 records.
        """
        done_n = np.zeros(num_lines, dtype=bool)
        for path in self._shard_files():
            records = self._records(path, report)
            indices = np.fromiter((index for index, _, _ in records), dtype=np.int64)
            done_n[indices] = True
        return done_n

    def merge(self, lines: range, report: OnProgress = ignore_progress) -> int:
        """Write the records of these requests, in input order, durably: the output whole or not.

        Holds three numbers per record and copies one record at a time.

        Args:
            lines: indices of the requests.
            report: called once per 4096 records.

        Returns:
            How many records are errors.

        Raises:
            OSError: a file cannot be read or written; the ledger is as it was.
            ValueError: a record is missing.
        """
        paths, num_lines = self._shard_files(), len(lines)
        shard_n = np.full(num_lines, -1, dtype=np.int32)
        offset_n = np.zeros(num_lines, dtype=np.int64)
        length_n = np.zeros(num_lines, dtype=np.int64)
        for number, path in enumerate(paths):
            for index, offset, length in self._records(path, report):
                row = index - lines.start
                shard_n[row], offset_n[row], length_n[row] = number, offset, length
        if (missing := np.flatnonzero(shard_n < 0)).size:
            raise ValueError(
                f"{self.directory}: {missing.size} of {num_lines} records are missing, first that "
                f"of request {lines[missing[0]]} (from 0); run the same command again to make them"
            )
        rows = zip(shard_n.tolist(), offset_n.tolist(), length_n.tolist(), strict=True)
        with ExitStack() as opened:
            fds = []
            for path in paths:
                fds.append(os.open(path, os.O_RDONLY))
                opened.callback(os.close, fds[-1])
            bodies = (
                read_record(fds[number], paths[number], length, offset)
                for number, offset, length in rows
            )
            return self._write(bodies, report)

    def _write(self, bodies: Iterable[bytes], report: OnProgress) -> int:
        """Write records to the output, errors to the error file; return how many are errors.

        Until the caller marks the output complete, the ledger holds them all: killed between the
        two renames, the next run writes both files again.
        """
        error_file = self.error_file
        temporary = _temporary(self.output)
        others = None if error_file is None else _temporary(error_file)
        num_errors = 0
        try:
            with ExitStack() as opened:
                out = errors = opened.enter_context(_durable(temporary, report))
                if others is not None:
                    errors = opened.enter_context(_durable(others, report))
                for row, body in enumerate(bodies):
                    if row % RECORDS_PER_REPORT == 0:
                        report()
                    failed = is_error(body)
                    num_errors += failed
                    (errors if failed else out).write(body + b"\n")
                out.sync()
                if errors is not out:
                    errors.sync()
            self.output_crc32 = out.crc32
            if error_file is not None and others is not None:
                self.error_crc32 = errors.crc32
                if num_errors:
                    os.replace(others, error_file)
                else:  # an earlier run of the lines may have had errors
                    error_file.unlink(missing_ok=True)
                    others.unlink()
            os.replace(temporary, self.output)
        except BaseException:
            for path in (temporary, others):
                if path is not None:
                    path.unlink(missing_ok=True)
            raise
        fsync_directory(self.output.parent)
        return num_errors

    def remove(self) -> None:
        """Remove the ledger of a complete output; the lock goes last, with its directory."""
        manifests = self.directory.glob("manifest.json*")
        for path in [*self._shard_files(), *manifests, self.directory / "lock"]:
            path.unlink()
        remove_empty(self.directory)

    def _records(self, path: Path, report: OnProgress) -> Iterator[tuple[int, int, int]]:
        """Yield what `scan_shard` does of the records of a ledger shard that count."""
        void_before = self.void_before.get(path.name, 0)
        with naming(path), path.open("rb", buffering=CHUNK) as file:
            if not void_before:  # of a million records: no call more for each
                yield from scan_shard(file, report)
                return
            for index, offset, length in scan_shard(file, report):
                is_old = offset < void_before
                if not (is_old and is_error(read_record(file.fileno(), path, length, offset))):
                    yield index, offset, length

    def _shard_files(self) -> list[Path]:
        return sorted(self.directory.glob("part-*.jsonl"))


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


@contextmanager
def _durable(path: Path, report: OnProgress) -> Iterator[DurableWriter]:
    with naming(path), path.open("wb", buffering=CHUNK) as file:
        yield DurableWriter(file, report)
