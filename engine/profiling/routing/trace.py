"""Routing trace: reads what `profiler.routing` has recorded (`trace_file.py`), loads and claims.

Legend: S steps, L MoE layers, E experts, T tokens, K top-k, N tokens of all layers together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from engine.profiling.routing.claim_log import (
    LayerClaims,
    join_claims,
    without_padding,
)
from engine.profiling.routing.trace_file import (
    CLAIMS,
    INT,
    LOADS,
    NUM_COLUMNS,
    TraceError,
    TraceHeader,
    check_same_model,
    read_header,
    record_size,
    scan_records,
)


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
        """Experts of each token, in the layer in which it has most."""
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


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise TraceError(
            f"{path}: cannot be read: {error.strerror}; check the file and its permissions"
        ) from error


def _read_loads(path: Path, stream: BinaryIO, header: TraceHeader) -> np.ndarray:
    """Return int32 [S, 6 + L * E], the whole records."""
    numbers = record_size(header, np.empty(0)) // INT.itemsize
    data = stream.read()
    num_records = len(data) // (numbers * INT.itemsize)
    records = np.frombuffer(data, INT, count=num_records * numbers).reshape(-1, numbers)
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
                yield _join(key, parts, trace)
    finally:
        for stream, _ in streams.values():
            stream.close()


def _read_claims(stream: BinaryIO, header: TraceHeader, offset: int) -> list[LayerClaims]:
    """Read one rank's claims of one step, layer by layer."""
    stream.seek(offset)
    columns = np.frombuffer(stream.read(INT.itemsize * NUM_COLUMNS), INT)
    data = stream.read(record_size(header, columns) - columns.nbytes)
    total, top_k, place = int(columns[5]), header.top_k, 0

    def take(dtype: np.dtype, *shape: int) -> np.ndarray:
        nonlocal place
        values = np.frombuffer(data, dtype, int(np.prod(shape)), place).reshape(shape)
        place += values.nbytes
        return values

    counts_L = take(INT, len(header.layers))
    request_N, position_N = take(INT, total), take(INT, total)
    ids_NK, scores_NK = take(INT, total, top_k), take(np.dtype("<f4"), total, top_k)
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
    key: tuple[int, int, int], parts: dict[int, list[LayerClaims]], trace: RoutingTrace
) -> StepClaims:
    """Join the ranks' claims of one step."""
    joined: dict[int, LayerClaims] = {}
    ranks: dict[int, np.ndarray] = {}
    for place, layer in enumerate(trace.layers):
        each = [claims[place] for claims in parts.values()]
        joined[layer] = without_padding(join_claims(each, trace.top_k))
        sizes = [len(part.request_T) for part in each]
        ranks[layer] = np.repeat(np.array(list(parts), dtype=np.int32), sizes)
    return StepClaims(*key, layers=joined, ranks=ranks)
