"""Index of a batch input: where each line is, and which ids repeat.

The input is indexed, not loaded: rank 0 scans the JSONL once (`scan_input`), at 32 bytes per line.
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
from typing import IO, Literal

import numpy as np

from engine.batch.atomic_files import naming
from engine.distributed.health.progress import OnProgress, ignore_progress

_BOM = b"\xef\xbb\xbf"
# The usual line starts with its id: no need to parse the rest of it to look for duplicates.
_LEADING_ID = re.compile(
    rb'\s*\{\s*"(custom_)?id"\s*:\s*(?:"([^"\\\x00-\x1f]*)"|(-?\d{1,4000})\s*[,}])'
)
_CHUNK = 1 << 20

Format = Literal["openai", "lockstep"]  # of a line or of records: OpenAI's or our own
OnLines = Callable[[list[bytes]], None]


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
