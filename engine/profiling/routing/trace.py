"""Routing trace: the files that `profiler.routing` fills, their format, and `read_trace`.

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

Legend: S steps, L MoE layers, E experts, T tokens, K top-k, N tokens of all layers together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine.profiling.routing.claim_log import LayerClaims

FORMAT, VERSION = "lockstep-routing", 1
LOADS, CLAIMS = "loads", "claims"
NUM_COLUMNS = 6  # at the head of each record
_INT = np.dtype("<i4")
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
    top_k: int
    every: int = 1  # of so many steps one was kept; a power of two
    format: str = FORMAT
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class StepClaims:
    """The claims of all ranks of a group in one step."""

    segment: int
    step: int
    first_rank: int  # of the group
    layers: dict[int, LayerClaims]  # tokens in rank order
    ranks: dict[int, np.ndarray]  # layer -> int32 [T], the rank of each token


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTrace:
    """The loads of all recorded steps, by segment, then step, then group."""

    folder: Path
    header: TraceHeader  # of the first file of loads
    every: int  # of so many steps one was kept, at least
    loads_SLE: np.ndarray  # int64, top-k assignments over all ranks of a group, before capacity
    tokens_S2: np.ndarray  # int64, prefill and decode tokens of the group
    segments_S: np.ndarray  # int64, from 1: one run of an engine each
    steps_S: np.ndarray  # int64, from 1 in each segment
    first_ranks_S: np.ndarray  # int64, the first rank of the group
    ranks_S: np.ndarray  # int64, number of ranks of the group

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the MoE layers in the model."""
        return tuple(self.header.layers)

    @property
    def num_experts(self) -> int:
        """Experts of each layer."""
        return self.header.num_experts

    @property
    def top_k(self) -> int:
        """Experts of each token."""
        return self.header.top_k

    @property
    def model(self) -> str:
        """The path of the model's checkpoint."""
        return self.header.model

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint (`weights/fingerprint.py`)."""
        return self.header.fingerprint

    def claims(self) -> Iterator[StepClaims]:
        """Yield the steps of which the claims of every rank were recorded; none without claims.

        Raises:
            TraceError: a file that cannot be read; it names the file.
        """
        yield from _claims(self)


def trace_path(folder: Path, kind: str, rank: int) -> Path:
    """Return a rank's file of loads or claims."""
    return folder / f"{kind}.rank{rank:05d}.routing"


def read_trace(path: str | Path) -> RoutingTrace:
    """Read the loads that a job has recorded; its claims are read when they are asked for.

    Args:
        path: the folder of `profiler.routing`, or one file of loads in it.

    Raises:
        TraceError: there is no trace, or it cannot be used; it names the file and what to do.
    """
    path = Path(path)
    files = sorted(path.glob(f"{LOADS}.rank*.routing")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise TraceError(
            f"{path}: no routing trace is there (loads.rank00000.routing); name the folder that "
            "profiler.routing named in a job"
        )
    headers, records = [], []
    for file in files:
        with _opened(file) as stream:
            header, _ = read_header(file, stream, LOADS)
            headers.append(header)
            records.append(_read_loads(file, stream, header))
        check_same_model(file, header, headers[0])
    first = headers[0]
    columns = np.concatenate([each[:, :NUM_COLUMNS] for each in records])
    ranks = np.repeat([header.rank for header in headers], [len(each) for each in records])
    order_S = np.lexsort((ranks, columns[:, 2], columns[:, 0]))
    columns = columns[order_S]
    loads = np.concatenate([each[:, NUM_COLUMNS:] for each in records])[order_S]
    return RoutingTrace(
        folder=path if path.is_dir() else path.parent,
        header=first,
        every=max(header.every for header in headers),
        loads_SLE=loads.reshape(-1, len(first.layers), first.num_experts).astype(np.int64),
        tokens_S2=columns[:, 3:5].astype(np.int64),
        segments_S=columns[:, 0].astype(np.int64),
        steps_S=columns[:, 2].astype(np.int64),
        first_ranks_S=ranks[order_S].astype(np.int64),
        ranks_S=columns[:, 5].astype(np.int64),
    )


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
        return _INT.itemsize * (NUM_COLUMNS + len(header.layers) * header.num_experts)
    tokens = int(columns[5])
    per_token = _INT.itemsize * (2 + 2 * header.top_k) + 1
    return _INT.itemsize * (NUM_COLUMNS + len(header.layers)) + tokens * per_token


def scan_records(
    stream: BinaryIO, header: TraceHeader, start: int, size: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield offset, bytes and columns (int32 [6]) of each whole record.

    Args:
        start: the offset of the first.
        size: of the file.
    """
    head = _INT.itemsize * NUM_COLUMNS
    while start + head <= size:
        stream.seek(start)
        columns = np.frombuffer(stream.read(head), _INT)
        # A file system that lost power may have zeros where data was to be.
        if len(columns) < NUM_COLUMNS or columns[0] <= 0 or columns[1:].min() < 0:
            return
        num_bytes = record_size(header, columns)
        if start + num_bytes > size:
            return
        yield start, num_bytes, columns
        start += num_bytes


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise TraceError(
            f"{path}: cannot be read: {error.strerror}; check the file and its permissions"
        ) from error


def _read_loads(path: Path, stream: BinaryIO, header: TraceHeader) -> np.ndarray:
    """Return int32 [S, 6 + L * E], the whole records."""
    numbers = record_size(header, np.empty(0)) // _INT.itemsize
    data = stream.read()
    num_records = len(data) // (numbers * _INT.itemsize)
    records = np.frombuffer(data, _INT, count=num_records * numbers).reshape(-1, numbers)
    empty = np.flatnonzero(records[:, 0] <= 0)
    records = records[: empty[0]] if len(empty) else records
    if (bad := np.flatnonzero((records < 0).any(1))).size:
        raise TraceError(
            f"{path}: record {bad[0]}: a count is negative; the file is damaged: copy it again, or "
            "record again"
        )
    return records


def _claims(trace: RoutingTrace) -> Iterator[StepClaims]:
    """Yield the steps whose claims every rank of the group has."""
    found: dict[tuple[int, int, int], dict[int, int]] = {}  # step -> rank -> offset
    sizes: dict[tuple[int, int, int], int] = {}
    streams: dict[int, tuple[BinaryIO, TraceHeader]] = {}
    try:
        for path in sorted(trace.folder.glob(f"{CLAIMS}.rank*.routing")):
            stream = _opened(path)
            header, start = read_header(path, stream, CLAIMS)
            streams[header.rank] = stream, header
            check_same_model(path, header, trace.header)
            for offset, _, columns in scan_records(stream, header, start, path.stat().st_size):
                segment, _, step, first_rank, num_ranks, _ = columns.tolist()
                key = segment, step, first_rank
                found.setdefault(key, {})[header.rank] = offset
                sizes[key] = num_ranks
        for key in sorted(found):
            if len(found[key]) == sizes[key]:
                parts = {
                    rank: _read_claims(*streams[rank], offset)
                    for rank, offset in sorted(found[key].items())
                }
                yield _join(key, parts, trace.layers)
    finally:
        for stream, _ in streams.values():
            stream.close()


def _read_claims(stream: BinaryIO, header: TraceHeader, offset: int) -> list[LayerClaims]:
    """Read one rank's claims of one step, layer by layer."""
    stream.seek(offset)
    columns = np.frombuffer(stream.read(_INT.itemsize * NUM_COLUMNS), _INT)
    data = stream.read(record_size(header, columns) - columns.nbytes)
    total, top_k, place = int(columns[5]), header.top_k, 0

    def take(dtype: np.dtype, *shape: int) -> np.ndarray:
        nonlocal place
        values = np.frombuffer(data, dtype, int(np.prod(shape)), place).reshape(shape)
        place += values.nbytes
        return values

    counts_L = take(_INT, len(header.layers))
    request_N, position_N = take(_INT, total), take(_INT, total)
    ids_NK, scores_NK = take(_INT, total, top_k), take(np.dtype("<f4"), total, top_k)
    eligible_N = take(np.dtype(np.uint8), total).astype(bool)
    ends = np.cumsum(counts_L)
    return [
        LayerClaims(
            request_T=request_N[end - count : end],
            position_T=position_N[end - count : end],
            eligible_T=eligible_N[end - count : end],
            topk_ids_TK=ids_NK[end - count : end],
            scores_TK=scores_NK[end - count : end],
        )
        for count, end in zip(counts_L, ends, strict=True)
    ]


def _join(
    key: tuple[int, int, int], parts: dict[int, list[LayerClaims]], layers: tuple[int, ...]
) -> StepClaims:
    """Join the ranks' claims of one step."""
    joined: dict[int, LayerClaims] = {}
    ranks: dict[int, np.ndarray] = {}
    for place, layer in enumerate(layers):
        each = [claims[place] for claims in parts.values()]
        joined[layer] = join_claims(each)
        sizes = [len(part.request_T) for part in each]
        ranks[layer] = np.repeat(np.array(list(parts), dtype=np.int32), sizes)
    return StepClaims(*key, layers=joined, ranks=ranks)


def join_claims(parts: list[LayerClaims]) -> LayerClaims:
    """Return the claims of all parts, one after the other."""
    names = [each.name for each in fields(LayerClaims)]
    values = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return LayerClaims(**values)
