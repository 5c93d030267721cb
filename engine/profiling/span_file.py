"""Span files: all spans of a rank, one JSON line per step, one file per rank, of bounded size.

Written if `profiler.spans` names a folder, for each complete step (`phase_clock.py`);
`tools/straggler_report.py` reads them. The first line of a file is a header. All stamps are on rank
0's clock. A file that would exceed half of the bound with the next step replaces `.old`, so the
newest steps are always there and both files together never exceed the bound. A step larger than
half of the bound deletes the steps that do not fit into it together; one larger than the whole
bound is not written.

    {"format": "lockstep-spans", "version": 2, "rank": 0, ...,
     "own_experts": {"3": [4, 5, 0]}, "num_homes": {"3": 2}, "num_copies": {"3": 1}}
    {"step": 17, "start_ns": 123, "prefill": 512, "decode": 3,
     "spans": [[phase, layer, offset_ns, duration_ns, tokens, bytes, waited_ns], ...],
     "before": {"3": [rows of every expert]}, "after": {"3": [rows of this rank's own experts]}}

waited_ns is -1 where the other ranks' arrivals are not known. A rank's own experts are those whose
home it is, then those that it has a copy of: above, of layer 3, experts 4 and 5, and a copy of 0.
Version 1 had the same contiguous experts in every layer, as `first_expert` and `num_local_experts`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from engine.profiling.loads import StepLoads
from engine.profiling.phase_clock import Phase, Spans
from engine.profiling.wait_time import waiting_ns

logger = logging.getLogger(__name__)

FORMAT, VERSION = "lockstep-spans", 2
_PROBE_BYTES = 2**16
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanFileHeader:
    """The first line of a span file; the field names are its keys."""

    rank: int
    host: str
    world_size: int
    group: list[int]  # global ranks in lockstep with this one
    clock_offset_ns: int  # what was added to this rank's own stamps when the run began
    clock_error_ns: int  # its uncertainty
    num_layers: int
    num_experts: int
    own_experts: dict[int, list[int]]  # layer -> experts of this rank: homes, then copies
    num_homes: dict[int, int]  # layer -> how many of them are homes
    num_copies: dict[int, int]  # layer -> copies on all ranks of the group
    policy: str
    phases: list[str] = field(default_factory=lambda: [phase.name.lower() for phase in Phase])
    format: str = FORMAT
    version: int = VERSION


def check_folder(folder: Path, rank: int) -> None:
    """Check that a rank's span files can be written into a folder, which is made if it is missing.

    Changes no span file that is there.

    Raises:
        OSError: they cannot be, or the disk is full; it names the folder or the file.
        ValueError: the folder's name is none that the system takes.
    """
    path = span_path(folder, rank)
    check_writable(folder, path.stem)
    for file in (path, old_path(path)):
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    if path.exists():
        path.open("ab").close()


def check_writable(folder: Path, name: str) -> None:
    """Check that a folder, which is made if it is missing, takes a new file of some size.

    name: of the file, which no other rank uses; it is deleted again.

    Raises:
        OSError: it does not, or the disk is full; it names the folder.
        ValueError: the folder's name is none that the system takes.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # which is said of a file
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    probe = folder / f"{name}.probe{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(b"\0" * _PROBE_BYTES)  # a full disk may take an empty file
            file.flush()
            try:
                os.fsync(file.fileno())  # some file systems notice only here
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise
    except OSError as error:
        error.filename = str(folder)  # not a file of this rank alone: all ranks have one error
        raise
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def span_path(folder: Path, rank: int) -> Path:
    """Return a rank's span file."""
    return folder / f"spans.rank{rank:05d}.jsonl"


def old_path(path: Path) -> Path:
    """Return the file with the older half of a span file's steps."""
    return path.with_suffix(".old.jsonl")


class SpanWriter:
    """Writes one rank's span files into an existing folder.

    Args:
        max_bytes: of both files together. A header is always written: some 600 bytes, and 4 for
            every expert of this rank in every layer.
        tensor_ranks: rank offsets of this rank's tensor group in the lockstep group.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, header: SpanFileHeader, max_bytes: int, tensor_ranks: range = range(1)
    ) -> None:
        self._tensor_ranks = tensor_ranks
        self._path = span_path(folder, header.rank)
        self._old = old_path(self._path)
        self._header = json.dumps(asdict(header)) + "\n"
        self._max_bytes, self._old_bytes = max_bytes, 0
        self._is_broken = False  # a write has failed
        self._old.unlink(missing_ok=True)
        self._file = self._open()

    def write(
        self,
        step: int,
        spans: Spans,
        arrivals_WC: np.ndarray | None,
        offset: int,
        tokens: tuple[int, int],
        loads: StepLoads,
    ) -> None:
        """Write one step, if it is complete. Nothing is written after the first error, which is
        logged.

        Args:
            arrivals_WC: as in `wait_time.py`; None where unknown.
            offset: nanoseconds to add to this rank's stamps to get rank 0's.
            tokens: prefill and decode.

        Raises:
            OSError: naming the file.
        """
        if self._is_broken or not spans.complete or not len(spans.starts):
            return
        start = int(spans.starts[0])
        offsets, durations = spans.starts - start, spans.ends - spans.starts
        waited = np.full_like(spans.starts, -1)
        if arrivals_WC is not None:
            waited = waiting_ns(spans, arrivals_WC, self._tensor_ranks)
        counts = spans.tokens, spans.num_bytes
        columns = (spans.phases, spans.layers, offsets, durations, *counts, waited)
        line = {
            "step": step,
            "start_ns": start + offset,
            "prefill": tokens[0],
            "decode": tokens[1],
            "spans": np.stack(columns, axis=1).tolist(),
            "before": {layer: before.tolist() for layer, (before, _) in loads.items()},
            "after": {layer: after for layer, (_, after) in loads.items()},
        }
        text = json.dumps(line, separators=(",", ":")) + "\n"
        try:
            if self._make_room(len(text)):
                self._written += self._file.write(text)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what is buffered and close the file. Safe to call twice."""
        try:
            self._file.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Write no more: a measurement that cannot be kept must not end the job."""
        if not self._is_broken:
            logger.warning(
                "profiler.spans: %s: %s; the job goes on, later steps are missing there",
                error.filename or self._path,
                error.strerror or error,
            )
        self._is_broken = True
        with suppress(OSError):
            self._file.close()

    def _make_room(self, size: int) -> bool:
        """Delete the oldest steps until another `size` bytes fit; False if they never do."""
        bound, alone = self._max_bytes, len(self._header) + size
        if self._written + size <= min(bound // 2, bound - self._old_bytes):
            return True
        if alone > bound:
            return False
        self._file.close()
        self._old.unlink(missing_ok=True)
        self._old_bytes = 0
        if len(self._header) < self._written <= bound - alone:
            self._path.replace(self._old)
            self._old_bytes = self._written
        self._file = self._open()
        return True

    def _open(self) -> IO[str]:
        file = self._path.open("w", encoding="utf-8")
        self._written = file.write(self._header)
        return file
