"""Index of a batch input, and the work queue that ranks take its lines from.

The input is indexed, not loaded: rank 0 scans the JSONL once (`scan_input`), at 32 bytes per line.
The lines without a record in the ledger are broadcast to every rank as one int64 table
(`PendingLines`). Ranks then take work-queue indices from a counter in the store (`WorkQueue`) and
read a line only when they run it. `line_parser.py` turns a line into a request.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, Protocol

import numpy as np
import torch.distributed as dist

from engine.batch.atomic_files import naming
from engine.batch.input_files import LineNames
from engine.distributed.health.progress import OnProgress, ignore_progress
from engine.request import Completion, Request

_BOM = b"\xef\xbb\xbf"
# The usual line starts with its id: no need to parse the rest of it to look for duplicates.
_LEADING_ID = re.compile(
    rb'\s*\{\s*"(custom_)?id"\s*:\s*(?:"([^"\\\x00-\x1f]*)"|(-?\d{1,4000})\s*[,}])'
)
_CHUNK = 1 << 20

Format = Literal["openai", "lockstep"]  # of a line or of records: OpenAI's or our own
OnLines = Callable[[list[bytes]], None]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input."""

    index: int  # among the requests, from 0
    number: int  # in the file, from 1; blank lines count
    raw: bytes
    duplicate_of: int = 0  # number of the earlier line with the same id, 0 without one
    earlier: str = field(default="", compare=False)  # where that one is, in words


@dataclass(frozen=True, slots=True, eq=False)
class InputIndex:
    """Where the requests of an input are in the file; n lines that are not blank."""

    path: Path
    size: int  # bytes
    sha256: str  # of the content, hex
    modified_ns: int
    offsets_n: np.ndarray  # int64, byte at which each line starts
    numbers_n: np.ndarray  # int64, line number from 1; blank lines count
    duplicates: dict[int, int]  # index of a line -> number of the earlier line with the same id
    first_of: dict[Format, int] = field(default_factory=dict)  # number of the first line of each
    # format, that of the input's first line first; a broken line has none

    def __len__(self) -> int:
        return len(self.offsets_n)


def scan_input(
    path: Path, report: OnProgress = ignore_progress, on_lines: OnLines | None = None
) -> InputIndex:
    """Read the file once, front to back, and return its index.

    Args:
        path: a JSONL file, one request per line.
        report: called once per MiB or so.
        on_lines: called as often with the next lines that are not blank.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is missing or no regular file.
    """
    if not path.is_file():
        reason = "is not a regular file" if path.exists() else "does not exist"
        raise ValueError(f"--input {path}: {reason}; give a JSONL file, one request per line")
    digest = hashlib.sha256()
    first_of: dict[Format, int] = {}
    offsets, numbers, hashes, nameless = array("q"), array("q"), array("q"), []
    offset = number = 0
    with naming(path), path.open("rb", buffering=0) as file:
        modified_ns = os.fstat(file.fileno()).st_mtime_ns
        for lines in _line_blocks(file, digest.update, report):
            texts = []
            for raw in lines:
                number += 1
                skip = len(_BOM) if number == 1 and raw.startswith(_BOM) else 0
                text = raw[skip:] if skip else raw
                if text and not text.isspace():
                    name, form = _id_and_format(text)
                    if name is None:
                        nameless.append(len(offsets))
                    if form is not None and form not in first_of:
                        first_of[form] = number
                    offsets.append(offset + skip)
                    numbers.append(number)
                    hashes.append(_hash(name))
                    texts.append(text)
                offset += len(raw) + 1
            if on_lines is not None:
                on_lines(texts)
        size = file.tell()
    offsets_n = np.array(offsets, dtype=np.int64)
    numbers_n = np.array(numbers, dtype=np.int64)
    candidates = _equal_hashes(np.array(hashes, dtype=np.int64), nameless)
    duplicates = _verify_duplicates(path, offsets_n, numbers_n, candidates, report)
    sha256 = digest.hexdigest()
    return InputIndex(path, size, sha256, modified_ns, offsets_n, numbers_n, duplicates, first_of)


def line_id(raw: bytes) -> str | int | None:
    """Return the id of a line as written, None where it has none that is text or a whole number.

    Never fails: a line that is broken further on still gets an error record under its own id. Where
    a line has several ids, which `line_parser.py` refuses, the first one written counts or, behind
    other keys, `custom_id`.
    """
    return _id_and_format(raw)[0]


def _id_and_format(raw: bytes) -> tuple[str | int | None, Format | None]:
    """Return the id of a line, and whose format it has: None where it is no JSON object."""
    if match := _LEADING_ID.match(raw):
        form: Format = "lockstep" if match[1] is None else "openai"
        try:
            return int(match[3]) if match[2] is None else match[2].decode(), form
        except UnicodeDecodeError:
            return None, form
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(value, dict):
        return None, None
    form = "openai" if "custom_id" in value or "body" in value else "lockstep"
    name = value.get("custom_id", value.get("id"))
    return name if isinstance(name, str | int) and not isinstance(name, bool) else None, form


def _hash(name: str | int | None) -> int:
    """Return a 64-bit hash of an id, valid in this process only."""
    return hash(name)


def _line_blocks(
    file: IO[bytes], update: Callable[[bytes], object], report: OnProgress = ignore_progress
) -> Iterator[list[bytes]]:
    """Yield the lines of a file without their line ends, thousands at a time.

    Args:
        file: opened for reading; text after the last line end counts as a line.
        update: called with every block that was read, such as a digest's `update`.
        report: called after every block.
    """
    begun: list[bytes] = []  # pieces of a line whose end has not been read
    while block := file.read(_CHUNK):
        update(block)
        report()
        first, *rest = block.split(b"\n")
        begun.append(first)
        if rest:
            last = rest.pop()
            yield [b"".join(begun), *rest]
            begun = [last]
    if last := b"".join(begun):
        yield [last]


def _equal_hashes(hashes_n: np.ndarray, nameless: list[int]) -> np.ndarray:
    """Return the indices, ascending, of lines that share their hash with another line with an id.

    Args:
        hashes_n: int64, hash of each line's id.
        nameless: indices of the lines without an id.
    """
    order_n = np.argsort(hashes_n, kind="stable")
    sorted_n = hashes_n[order_n]
    same = sorted_n[1:] == sorted_n[:-1]
    shared_n = np.zeros(len(hashes_n), dtype=bool)
    shared_n[order_n[1:][same]] = True
    shared_n[order_n[:-1][same]] = True
    shared_n[nameless] = False
    return np.flatnonzero(shared_n)


def _verify_duplicates(
    path: Path,
    offsets_n: np.ndarray,
    numbers_n: np.ndarray,
    candidates: np.ndarray,
    report: OnProgress,
) -> dict[int, int]:
    """Return `InputIndex.duplicates`: read the candidates' ids again, as hashes may collide."""
    first: dict[tuple[type, str | int], int] = {}
    duplicates = {}
    with naming(path), path.open("rb") as file:
        for index in candidates.tolist():
            report()
            file.seek(int(offsets_n[index]))
            name = line_id(file.readline())
            if name is None:
                continue
            number = int(numbers_n[index])
            earlier = first.setdefault((type(name), name), number)
            if earlier != number:
                duplicates[index] = earlier
    return duplicates


class PendingLines:
    """The lines still to run, by work-queue index; each rank reads them from the file itself."""

    def __init__(self, path: Path, table: np.ndarray, names: LineNames | None = None) -> None:
        """Open the input.

        Args:
            path: the input.
            table: from `select`, in any order; equal on every rank.
            names: where its lines are in the user's files.
        """
        self.names = names or LineNames()
        self._path = path
        self._file = path.open("rb")
        self._table = table
        self._by_index: np.ndarray | None = None  # queue indices, ascending by the lines' index

    @staticmethod
    def select(index: InputIndex, done_n: np.ndarray, lines: range | None = None) -> np.ndarray:
        """Return the table of the lines that are not done, in input order.

        Args:
            index: of the whole input.
            done_n: bool, per line.
            lines: indices to choose from; None: all.

        Returns:
            int64 [P, 4]: index, byte offset, line number, number of the earlier line with the same
            id or 0.
        """
        own = range(len(index)) if lines is None else lines
        todo = own.start + np.flatnonzero(~done_n[own.start : own.stop])
        duplicate_of_n = np.zeros(len(index), dtype=np.int64)
        duplicate_of_n[list(index.duplicates)] = list(index.duplicates.values())
        columns = (todo, index.offsets_n[todo], index.numbers_n[todo], duplicate_of_n[todo])
        return np.stack(columns, axis=1)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, queue_index: int) -> Line:
        index, offset, number, duplicate_of = self._table[queue_index].tolist()
        with naming(self._path):
            self._file.seek(offset)
            raw = self._file.readline()
        earlier = self.names.describe(duplicate_of) if duplicate_of else ""
        return Line(index, number, raw, duplicate_of, earlier)

    def number_of(self, index: int) -> int:
        """Return the line number of the pending request `index`."""
        if self._by_index is None:
            self._by_index = np.argsort(self._table[:, 0])
        row = int(np.searchsorted(self._table[:, 0], index, sorter=self._by_index))
        return int(self._table[self._by_index[row], 2])

    def close(self) -> None:
        """Close the input file."""
        self._file.close()


class Lines(Protocol):
    """Lines by work-queue index: `PendingLines`, or the built-in prompts."""

    def __len__(self) -> int: ...

    def __getitem__(self, queue_index: int) -> Line: ...


class WorkQueue:
    """The request source of one data rank; all data ranks take from one counter in the store."""

    limit: int  # requests this rank may hold at once, so that few requests spread over all ranks:
    # 8 on 2 ranks go 4 and 4

    def __init__(
        self,
        lines: Lines,
        parse: Callable[[Line], Request | Completion],
        store: dist.Store,
        key: str,
        num_data: int,
    ) -> None:
        """Build the queue of one data rank.

        Args:
            lines: what to run, equal on every rank.
            parse: turns a line into a request, or into an error record.
            store: holds the counter.
            key: the counter's; must be unused before this run.
            num_data: number of data ranks.
        """
        self.limit = max(1, -(-len(lines) // num_data))
        self._lines = lines
        self._parse = parse
        self._store = store
        self._key = key
        self._exhausted = False

    def take(self) -> Request | Completion | None:
        """Return the next request, an error record for a bad line, or None when nothing is left.

        Uses the store: only the first rank of each tensor group must call.
        """
        if self._exhausted:
            return None
        queue_index = self._store.add(self._key, 1) - 1
        if queue_index >= len(self._lines):
            self._exhausted = True
            return None
        return self._parse(self._lines[queue_index])

    def is_exhausted(self) -> bool:
        """Return whether all lines have been taken. Takes none."""
        return self._exhausted or self._store.add(self._key, 0) >= len(self._lines)
