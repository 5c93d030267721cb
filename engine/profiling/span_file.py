"""Span files: all spans of a rank, one JSON line per step, one file per rank, of bounded size.

Written if `profiler.spans` names a folder; `tools/straggler_report.py` reads them. The first line
of a file is a header. All stamps are on rank 0's clock. A file that would exceed half of the bound
with the next step replaces `.old`, so the newest steps are always there and both files together
never exceed the bound. A step larger than half of the bound deletes the steps that do not fit into
it together; one larger than the whole bound is not written.

    {"format": "lockstep-spans", "version": 1, "rank": 0, ...}
    {"step": 17, "start_ns": 123, "prefill": 512, "decode": 3,
     "spans": [[phase, layer, offset_ns, duration_ns, tokens, bytes, waited_ns], ...],
     "before": {"3": [rows of every expert]}, "after": {"3": [rows of this rank's own experts]}}

waited_ns is -1 where the other ranks' arrivals are not known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from engine.profiling.loads import StepLoads
from engine.profiling.phase_clock import Phase, Spans
from engine.profiling.wait_time import waiting_ns

FORMAT, VERSION = "lockstep-spans", 1


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
    first_expert: int
    num_local_experts: int
    policy: str
    phases: list[str] = field(default_factory=lambda: [phase.name.lower() for phase in Phase])
    format: str = FORMAT
    version: int = VERSION


class SpanWriter:
    """Writes one rank's span files into an existing folder.

    Args:
        max_bytes: of both files together. A header, some 600 bytes, is always written.
        tensor_ranks: rank offsets of this rank's tensor group in the lockstep group.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, header: SpanFileHeader, max_bytes: int, tensor_ranks: range = range(1)
    ) -> None:
        self._tensor_ranks = tensor_ranks
        self._path = folder / f"spans.rank{header.rank:05d}.jsonl"
        self._old = self._path.with_suffix(".old.jsonl")
        self._header = json.dumps(asdict(header)) + "\n"
        self._max_bytes, self._old_bytes = max_bytes, 0
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
        """Write one step.

        Args:
            arrivals_WC: as in `wait_time.py`; None where unknown.
            offset: nanoseconds to add to this rank's stamps to get rank 0's.
            tokens: prefill and decode.

        Raises:
            OSError: naming the file.
        """
        if not len(spans.starts):
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
        with self._naming():
            if self._make_room(len(text)):
                self._written += self._file.write(text)

    def close(self) -> None:
        """Write what is buffered and close the file. Safe to call twice."""
        with self._naming():
            self._file.close()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Name the file in an OSError that names none, such as that of a full disk."""
        try:
            yield
        except OSError as error:
            if error.filename is None:
                error.filename = str(self._path)
            raise

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
