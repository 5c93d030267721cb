"""Spans: what a job's span files say of its MoE layers, to fit costs to.

Legend: W ranks, e experts and copies on a rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.profiling.phase_clock import NO_LAYER, WARM_UP, Phase
from engine.profiling.span_file import FORMAT, VERSION, old_path

_SECOND = 1e-9


@dataclass(slots=True)
class RankLayer:
    """One MoE layer of one step on one rank."""

    rows_e: list[int]  # that each of its experts and copies computed
    seconds: dict[Phase, float] = field(default_factory=dict)
    waited: dict[Phase, float] = field(default_factory=dict)  # for later ranks
    num_bytes: dict[Phase, int] = field(default_factory=dict)  # sent
    tokens: dict[Phase, int] = field(default_factory=dict)  # rows in dispatch and combine
    calls: dict[Phase, int] = field(default_factory=dict)

    def add(self, span: list[int]) -> None:
        """Add a span as it is in the file."""
        phase, _, _, duration, tokens, num_bytes, waited = span
        kind = Phase(phase)
        self.seconds[kind] = self.seconds.get(kind, 0.0) + duration * _SECOND
        self.waited[kind] = self.waited.get(kind, 0.0) + max(waited, 0) * _SECOND
        self.num_bytes[kind] = self.num_bytes.get(kind, 0) + num_bytes
        self.tokens[kind] = self.tokens.get(kind, 0) + tokens
        if kind in (Phase.DISPATCH, Phase.COMBINE) or tokens:
            self.calls[kind] = self.calls.get(kind, 0) + 1

    @property
    def total(self) -> float:
        """Seconds of the layer."""
        return sum(self.seconds.values())


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One MoE layer of one step on all ranks of a group."""

    step: int
    layer: int
    ranks: list[RankLayer]

    @property
    def seconds(self) -> float:
        """Seconds of the layer, the mean over ranks, which wait for each other."""
        return float(np.mean([each.total for each in self.ranks]))

    @property
    def most_rows(self) -> int:
        """Rows of the most loaded rank."""
        return max(sum(each.rows_e) for each in self.ranks)


def read_calls(folder: Path, skip: int = WARM_UP) -> list[LayerCall]:
    """Return the layers of all steps that every rank of the first group has recorded.

    Args:
        folder: of profiler.spans.
        skip: first steps to leave out: they compile kernels and make connections.

    Raises:
        ValueError: there are no such files, or they cannot be used; it says what to do.
    """
    files = sorted(folder.glob("spans.rank?????.jsonl"))
    if not files:
        raise ValueError(
            f"--fit {folder}: holds no spans.rank*.jsonl; name the folder that profiler.spans "
            "named in a job"
        )
    headers = {each["rank"]: (path, each) for path in files for each in [_header(path)]}
    group = headers[min(headers)][1]["group"]
    if missing := [rank for rank in group if rank not in headers]:
        raise ValueError(
            f"--fit {folder}: the spans of rank {missing[0]} are missing; copy those of all nodes "
            "into one folder"
        )
    steps: list[dict[int, dict[int, RankLayer]]] = [
        dict(_steps(headers[rank][0], folder)) for rank in group
    ]
    common = sorted(set.intersection(*(set(each) for each in steps)))
    calls = []
    for step in common[skip:]:
        for layer in steps[0][step]:
            ranks = [each[step][layer] for each in steps if layer in each[step]]
            if len(ranks) == len(group) and any(sum(each.rows_e) for each in ranks):
                calls.append(LayerCall(step, layer, ranks))
    if not calls:
        raise ValueError(
            f"--fit {folder}: no complete steps of MoE layers behind the first {skip}; run a "
            "longer job, with profiler.every=1 on a GPU"
        )
    _check_plain(calls, folder)
    return calls


def _check_plain(calls: list[LayerCall], folder: Path) -> None:
    for call in calls:
        for each in call.ranks:
            if each.seconds.get(Phase.TENSOR):
                raise ValueError(
                    f"--fit {folder}: the job ran with parallel.tensor above 1, which the cost "
                    "model does not have; record one with parallel.tensor=1"
                )
            if each.calls.get(Phase.DISPATCH, 0) > 1:
                raise ValueError(
                    f"--fit {folder}: the job overlapped chunks or micro-batches, which the cost "
                    "model does not have; record one with moe.overlap.chunks=1 and "
                    "moe.overlap.two_batch=false"
                )


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            header = json.loads(file.readline())
        if (header["format"], header["version"]) != (FORMAT, VERSION):
            raise ValueError(f"version {header['version']}")
        return header
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--fit {path}: is no span file of version {VERSION} ({error}); record it again"
        ) from error


def _steps(path: Path, folder: Path) -> Iterator[tuple[int, dict[int, RankLayer]]]:
    for part in (old_path(path), path):
        if not part.exists():
            continue
        with part.open(encoding="utf-8") as file:
            next(file, None)
            for line in file:
                try:
                    step = json.loads(line)
                    yield step["step"], _layers(step)
                except (ValueError, KeyError, TypeError) as error:
                    if not line.endswith("\n"):  # the job was killed while it wrote
                        break
                    raise ValueError(
                        f"--fit {folder}: {part.name}: a line cannot be read ({error}); record the "
                        "spans again"
                    ) from error


def _layers(step: dict[str, Any]) -> dict[int, RankLayer]:
    found = {int(layer): RankLayer(rows) for layer, rows in step["after"].items()}
    for span in step["spans"]:
        layer = span[1]
        if layer != NO_LAYER and layer in found:
            found[layer].add(span)
    return found
