"""Lines of the input that are still to run, read from the file when they run.

The lines without a record in the ledger are broadcast to every rank as one int64 table
(`PendingLines`). `line_parser.py` turns a line into a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.batch.atomic_files import naming
from engine.batch.input.files import LineNames
from engine.batch.input.index import InputIndex


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input."""

    index: int  # among the requests, from 0
    number: int  # in the file, from 1; blank lines count
    raw: bytes
    duplicate_of: int = 0  # number of the earlier line with the same id, 0 without one
    earlier: str = field(default="", compare=False)  # where that one is, in words


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
