"""Trace file: the format of a routing trace, header and records.

One file of loads per expert-parallel group, written by its first rank, and with
`profiler.routing_claims` one file of claims per rank. Each begins with one line of JSON, the header
(`TraceHeader`). Records of one step each follow; their numbers are little-endian.

    loads.rank00000.routing     int32 [6]     segment, index, step, prefill, decode, ranks
                                int32 [L, E]  rows of every expert in every layer
    claims.rank00000.routing    int32 [6]     segment, index, step, first rank of the group, ranks,
                                              tokens of all layers together (N)
                                int32 [L]     tokens of every layer
                                int32 [N]     request, then int32 [N] position; -1: unknown
                                int32 [N, K]  chosen experts, best first
                                float32 [N, K]  their scores
                                uint8 [N]     1: subject to capacity

A segment is one run of an engine; a job that resumes begins a new one. `index` counts the steps of
all segments; a thinned file has those that its header's `every` divides. A record that was cut off,
because the job was killed, ends the file: what is before it is read.

Legend: L MoE layers, E experts, K top-k, N tokens of all layers together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT, VERSION = "lockstep-routing", 1
LOADS, CLAIMS = "loads", "claims"
NUM_COLUMNS = 6  # at the head of each record
INT = np.dtype("<i4")
_MAX_HEADER = 1 << 20


class TraceError(ValueError):
    """A file that is no trace or cannot be used; the text names it and says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    """The first line of a file; the field names are its keys."""

    kind: str  # loads or claims
    rank: int  # that wrote the file
    host: str
    model: str  # the path of its checkpoint
    fingerprint: str  # of the model (`weights/fingerprint.py`)
    layers: list[int]  # numbers of the MoE layers in the model
    num_experts: int
    top_k: int  # of the layer in which a token has most
    every: int = 1  # of so many steps one was kept; a power of two
    format: str = FORMAT
    version: int = VERSION


def trace_path(folder: Path, kind: str, rank: int) -> Path:
    """Return a rank's file of loads or claims."""
    return folder / f"{kind}.rank{rank:05d}.routing"


def read_header(path: Path, stream: BinaryIO, kind: str) -> tuple[TraceHeader, int]:
    """Read a file's header; return it and the offset of the first record.

    Raises:
        TraceError: it is none, or of another version; it names the file, the field and what to do.
    """
    line = stream.readline(_MAX_HEADER)
    try:
        values: Any = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise TraceError(
            f"{path}: is no routing trace, or its first line is cut off; name a file that a job "
            "with profiler.routing wrote, or delete this one"
        )
    if values.get("version") != VERSION:
        raise TraceError(
            f"{path}: version = {values.get('version')!r}: this program reads version {VERSION}; "
            "record the trace again, or read it with the program that wrote it"
        )
    for each in fields(TraceHeader):
        value = values.get(each.name)
        kinds: dict[str, type] = {"str": str, "int": int, "list[int]": list}
        is_valid = type(value) is kinds[str(each.type)]
        if is_valid and each.name in ("num_experts", "top_k", "every"):
            is_valid = int(value or 0) > 0
        if isinstance(value, list):
            is_valid = bool(value) and all(type(item) is int for item in value)
        if not is_valid or (each.name == "kind" and value != kind):
            raise TraceError(
                f"{path}: {each.name} = {value!r}: is not what a file of {kind} has there; copy "
                "the file again, or delete it"
            )
    names = [each.name for each in fields(TraceHeader)]
    return TraceHeader(**{name: values[name] for name in names}), len(line)


def check_same_model(path: Path, header: TraceHeader, other: TraceHeader) -> None:
    """Check that a file is of the same model as another header.

    Raises:
        TraceError: naming the file and the first field that differs.
    """
    for name in ("fingerprint", "layers", "num_experts", "top_k"):
        mine, theirs = getattr(header, name), getattr(other, name)
        if mine != theirs:
            raise TraceError(
                f"{path}: {name} = {mine!r}: is of another model ({header.model}) than {theirs!r} "
                f"({other.model}); give every model a folder of its own"
            )


def record_size(header: TraceHeader, columns: np.ndarray) -> int:
    """Return the bytes of a record, columns included.

    columns: int32 [6], the record's first numbers.
    """
    if header.kind == LOADS:
        return INT.itemsize * (NUM_COLUMNS + len(header.layers) * header.num_experts)
    tokens = int(columns[5])
    per_token = INT.itemsize * (2 + 2 * header.top_k) + 1
    return INT.itemsize * (NUM_COLUMNS + len(header.layers)) + tokens * per_token


def scan_records(
    stream: BinaryIO, header: TraceHeader, start: int, size: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield offset, bytes and columns (int32 [6]) of each whole record.

    Args:
        start: the offset of the first.
        size: of the file.
    """
    head = INT.itemsize * NUM_COLUMNS
    while start + head <= size:
        stream.seek(start)
        columns = np.frombuffer(stream.read(head), INT)
        # A file system that lost power may have zeros where data was to be.
        if len(columns) < NUM_COLUMNS or columns[0] <= 0 or columns[1:].min() < 0:
            return
        num_bytes = record_size(header, columns)
        if start + num_bytes > size:
            return
        yield start, num_bytes, columns
        start += num_bytes
