"""Trace writer: one file of a routing trace, appended to step by step, of bounded size.

When a step does not fit any more, `every` doubles and the file is written anew with the steps whose
index it divides, so it covers the whole job with even gaps. As powers of two divide each other, the
files of all ranks have steps in common, whatever their sizes. A file and the one that is to replace
it are never larger than the bound together.

A record is appended in one write, without a buffer: a job that is killed leaves a file that lacks
at most the end of its last record. An existing file is continued.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from io import FileIO
from pathlib import Path

import numpy as np

from engine.profiling.routing.trace_file import (
    NUM_COLUMNS,
    TraceError,
    TraceHeader,
    check_same_model,
    read_header,
    record_size,
    scan_records,
    trace_path,
)

logger = logging.getLogger(__name__)

_MAX_INDEX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TraceEnd:
    """Where a trace ends, over some files, and with which thinning."""

    segment: int = 0  # the last one
    index: int = -1  # the last step's
    every: int = 1
    fingerprint: str = ""  # of the model; of world rank 0 alone

    def join(self, other: TraceEnd) -> TraceEnd:
        """Return the end of both, with this fingerprint."""
        return TraceEnd(
            max(self.segment, other.segment),
            max(self.index, other.index),
            max(self.every, other.every),
            self.fingerprint or other.fingerprint,
        )

    @property
    def next_index(self) -> int:
        """The first step of another segment, which every thinning so far keeps."""
        return (self.index + self.every) // self.every * self.every


def find_end(folder: Path, kind: str, rank: int) -> tuple[TraceEnd, TraceHeader | None]:
    """Return where a rank's file ends, and its header; None where there is no file.

    Raises:
        OSError: it cannot be read.
        TraceError: it is no trace.
    """
    path = trace_path(folder, kind, rank)
    if not path.exists() or not path.stat().st_size:
        return TraceEnd(), None
    with path.open("rb") as file:
        header, start = read_header(path, file, kind)
        end = TraceEnd(every=header.every)
        for _, _, columns in scan_records(file, header, start, path.stat().st_size):
            end = end.join(TraceEnd(int(columns[0]), int(columns[1])))
    return end, header


class TraceWriter:
    """Appends records to one rank's file of loads or claims, in an existing folder.

    Args:
        header: of a new file; the file that is there must be of the same model.
        max_bytes: of the file, and of the one that replaces it, together.

    Raises:
        OSError: the file cannot be read or written.
        TraceError: it is of another model, or no trace, or another job writes it.
    """

    def __init__(self, folder: Path, header: TraceHeader, max_bytes: int) -> None:
        self.path = trace_path(folder, header.kind, header.rank)
        self.num_written = 0  # steps of this segment that are in the file
        self._limit = max_bytes * 2 // 3  # the half that thinning leaves fits beside it
        self._segment: int | None = None  # of the records written
        self._is_broken = self._is_too_large = False
        _, old = find_end(folder, header.kind, header.rank)
        if old is not None:
            check_same_model(self.path, old, header)
        self.header = header if old is None else replace(header, every=old.every)
        self._file = self._open()
        if old is None:
            self._rewrite()
        else:
            self._size = self._cut_off(old)

    def keeps(self, index: int) -> bool:
        """Return whether the step with this index is to be recorded."""
        return index % self.header.every == 0 and not self._is_broken and index <= _MAX_INDEX

    def append(self, record: bytes, columns: tuple[int, ...]) -> None:
        """Append one step's record, if the bound leaves it room. Nothing is written after the first
        error, which is logged.

        columns: the six numbers with which the record begins.
        """
        segment, index = columns[:2]
        if segment != self._segment:
            self._segment, self.num_written = segment, 0
        try:
            while self.keeps(index) and self._size + len(record) > self._limit:
                if self._first + len(record) > self._limit:
                    self._warn_too_large(len(record))
                    return
                self.header = replace(self.header, every=self.header.every * 2)
                self._rewrite()
            if self.keeps(index):
                self._write(record)
                self.num_written += 1
        except (OSError, TraceError) as error:
            self._give_up(error)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        with suppress(OSError):
            self._file.close()

    def _open(self) -> FileIO:
        file = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise TraceError(
                f"{self.path}: another job is recording into it; name a folder of its own in "
                "profiler.routing"
            ) from None
        except OSError:  # a file system without locks
            pass
        return file

    def _cut_off(self, header: TraceHeader) -> int:
        """Remove a record that a killed job has left unfinished; return the size of the file."""
        with self.path.open("rb") as file:
            _, end = read_header(self.path, file, header.kind)
            self._first = end
            for offset, size, _ in scan_records(file, header, end, self.path.stat().st_size):
                end = offset + size
        os.truncate(self.path, end)
        return end

    def _rewrite(self) -> None:
        """Write the file anew, with the steps that are kept from now on alone."""
        line = (json.dumps(asdict(self.header)) + "\n").encode()
        temporary = self.path.with_suffix(".tmp")
        self.num_written = 0
        with temporary.open("wb") as new, self.path.open("rb") as old:
            new.write(line)
            size = len(line)
            if self.path.stat().st_size:
                header, start = read_header(self.path, old, self.header.kind)
                end = self.path.stat().st_size
                for offset, num_bytes, columns in scan_records(old, header, start, end):
                    if columns[1] % self.header.every == 0:
                        old.seek(offset)
                        size += new.write(old.read(num_bytes))
                        self.num_written += int(columns[0]) == self._segment
        self._file.close()
        os.replace(temporary, self.path)
        self._file = self._open()
        self._size, self._first = size, len(line)

    def _write(self, record: bytes) -> None:
        written = self._file.write(record) or 0
        self._size += written
        while written < len(record):  # a disk that is nearly full; the next write says so
            more = self._file.write(record[written:]) or 0
            written, self._size = written + more, self._size + more

    def _warn_too_large(self, size: int) -> None:
        if not self._is_too_large:
            logger.warning(
                "profiler.routing_mib: a step of %d bytes does not fit into %s and is left out; "
                "at least %.4f would be needed",
                size,
                self.path,
                (size + self._first) * 1.5 / 2**20,
            )
        self._is_too_large = True

    def _give_up(self, error: OSError | TraceError) -> None:
        """Write no more: a recording that cannot be kept must not end the job."""
        logger.warning(
            "profiler.routing: %s: %s; the job goes on, later steps are missing there",
            getattr(error, "filename", None) or self.path,
            getattr(error, "strerror", None) or error,
        )
        self._is_broken = True
        self.close()


def min_bytes(header: TraceHeader) -> int:
    """Return the least bound under which a file of loads can have a step."""
    line = len(json.dumps(asdict(header))) + 16
    return (line + record_size(header, np.zeros(NUM_COLUMNS, np.int32))) * 3 // 2 + 2
