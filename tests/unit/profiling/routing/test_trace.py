"""engine/profiling/routing/trace.py: what cannot be read is named by file and field.

Run: pytest tests/unit/profiling/routing/test_trace.py
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.profiling.loads import StepLoads
from engine.profiling.report import StepReport
from engine.profiling.routing.claim_log import ClaimLog, LayerClaims
from engine.profiling.routing.recorder import RecorderGroup, RoutingRecorder
from engine.profiling.routing.trace import (
    read_trace,
)
from engine.profiling.routing.trace_file import (
    CLAIMS,
    LOADS,
    TraceHeader,
    trace_path,
)
from engine.profiling.routing.writer import TraceEnd, TraceWriter

HEADER = TraceHeader(
    kind=LOADS,
    rank=0,
    host="h",
    model="m",
    fingerprint="f0",
    layers=[0, 2],
    num_experts=3,
    top_k=2,
)
LARGE = 1 << 20


def record(folder: Path, rank: int, tokens: list[list[int]], claims_bytes: int = LARGE) -> None:
    """Record steps on one of two ranks; a step has one entry per layer: the rank's tokens."""
    header = replace(HEADER, rank=rank)
    loads = TraceWriter(folder, header, LARGE) if rank == 0 else None
    claims = TraceWriter(folder, replace(header, kind=CLAIMS), claims_bytes)
    group = RecorderGroup(first_rank=0, num_ranks=2)
    recorder = RoutingRecorder(folder, header, group, TraceEnd(), loads, claims)
    log = ClaimLog()
    recorder.start(log)
    for number, counts in enumerate(tokens, 1):
        rows: StepLoads = {}
        for layer, count in zip(HEADER.layers, counts, strict=True):
            if log.step is not None and count:
                half = count // 2
                for first, end in ((0, half), (half, count)):  # two micro-batches
                    log.add(layer, layer_claims(rank, number, range(first, end)))
            rows[layer] = (np.array([2 * count, 2 * count, 0]), [])  # both ranks have as many
        recorder.add(step_report(number), rows)
    recorder.add(step_report(99), {})  # a step in which no layer ran
    recorder.close()
    assert log.step is None


def layer_claims(rank: int, step: int, rows: range) -> LayerClaims:
    return LayerClaims(
        request_T=np.full(len(rows), rank, dtype=np.int32),
        position_T=np.array(rows, dtype=np.int32),
        eligible_T=np.array([row % 2 == 0 for row in rows], dtype=bool),
        topk_ids_TK=np.array([[row % 2, 1 - row % 2] for row in rows]).reshape(-1, 2),
        scores_TK=np.array([[step, 0.5] for _ in rows], dtype=np.float32).reshape(-1, 2),
    )


def step_report(step: int) -> StepReport:
    return StepReport(step, 4 * step, step, 0, 0, 0, 1.0, 0.0)


def test_the_claims_of_all_ranks_are_joined_in_rank_order(tmp_path):
    tokens = [[3, 1], [0, 0], [2, 2]]
    for rank in range(2):
        record(tmp_path, rank, tokens)
    trace = read_trace(tmp_path)
    assert trace.steps_S.tolist() == [1, 2, 3]
    assert trace.tokens_S2.tolist() == [[4, 1], [8, 2], [12, 3]]
    steps = list(trace.claims())
    assert [step.step for step in steps] == [1, 2, 3]
    for number, (step, counts) in enumerate(zip(steps, tokens, strict=True)):
        for place, (layer, count) in enumerate(zip(trace.layers, counts, strict=True)):
            found = step.layers[layer]
            assert step.ranks[layer].tolist() == [0] * count + [1] * count
            assert found.request_T.tolist() == step.ranks[layer].tolist()
            assert found.position_T.tolist() == 2 * list(range(count))
            assert found.eligible_T.tolist() == [row % 2 == 0 for row in range(count)] * 2
            assert (found.scores_TK == [number + 1, 0.5]).all()
            rows_E = np.bincount(found.topk_ids_TK.ravel(), minlength=3)
            assert rows_E.tolist() == trace.loads_SLE[number, place].tolist()


def test_ranks_with_unequal_thinning_have_steps_in_common(tmp_path):
    record(tmp_path, 0, [[1, 1]] * 64, claims_bytes=1800)
    record(tmp_path, 1, [[3, 3]] * 64, claims_bytes=1800)
    trace = read_trace(tmp_path)
    assert len(trace.steps_S) == 64, "loads keep all"
    steps = [claims.step - 1 for claims in trace.claims()]
    assert len(steps) > 1 and steps == list(range(0, 64, steps[1]))


def test_steps_of_a_rank_whose_file_is_missing_are_left_out(tmp_path):
    for rank in range(2):
        record(tmp_path, rank, [[2, 2]] * 3)
    path = trace_path(tmp_path, CLAIMS, 1)
    path.write_bytes(path.read_bytes()[:-3])
    assert [claims.step for claims in read_trace(tmp_path).claims()] == [1, 2]
    path.unlink()
    assert list(read_trace(tmp_path).claims()) == []


def test_groups_are_read_together_by_segment_and_step(tmp_path):
    for rank in (2, 0):
        writer = TraceWriter(tmp_path, replace(HEADER, rank=rank), LARGE)
        for index in range(2):
            columns = (1, index, index + 1, 1, 0, 2)
            data = np.array([*columns, *[rank] * 6], dtype="<i4").tobytes()
            writer.append(data, columns)
        writer.close()
    trace = read_trace(tmp_path)
    assert trace.steps_S.tolist() == [1, 1, 2, 2]
    assert trace.first_ranks_S.tolist() == [0, 2, 0, 2] == trace.loads_SLE[:, 0, 0].tolist()
    assert read_trace(trace_path(tmp_path, LOADS, 2)).first_ranks_S.tolist() == [2, 2]


def test_a_folder_without_a_trace_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match=r"no routing trace is there \(loads\.rank"):
            read_trace(path)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("format", "other", "is no routing trace"),
        ("version", 2, "version = 2: this program reads version 1"),
        ("kind", CLAIMS, "kind = 'claims': is not what a file of loads has there"),
        ("layers", [], r"layers = \[\]"),
        ("layers", ["0"], r"layers = \['0'\]"),
        ("num_experts", 0, "num_experts = 0"),
        ("top_k", None, "top_k = None"),
        ("every", True, "every = True"),
    ],
)
def test_a_wrong_header_is_refused_by_file_and_field(tmp_path, field: str, value: Any, text: str):
    path = trace_path(tmp_path, LOADS, 0)
    path.write_text(json.dumps(asdict(HEADER) | {field: value}) + "\n")
    with pytest.raises(ValueError, match=rf"loads\.rank00000\.routing: {text}"):
        read_trace(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"\0" * 99, b"[]\n", b"{}\n", b'"' + b"x" * 99])
def test_a_file_that_is_no_trace_is_refused(tmp_path, data):
    trace_path(tmp_path, LOADS, 0).write_bytes(data)
    with pytest.raises(ValueError, match="is no routing trace, or its first line is cut off"):
        read_trace(tmp_path)


def test_a_damaged_count_and_another_model_are_refused(tmp_path):
    columns = (1, 0, 1, 1, 0, 2)
    data = np.array([*columns, 1, 1, -4, 1, 1, 1], dtype="<i4").tobytes()
    TraceWriter(tmp_path, HEADER, LARGE).append(data, columns)
    with pytest.raises(ValueError, match="record 0: a count is negative"):
        read_trace(tmp_path)
    trace_path(tmp_path, LOADS, 0).unlink()
    for rank in range(2):
        TraceWriter(tmp_path, replace(HEADER, rank=rank, fingerprint=f"f{rank}"), LARGE).close()
    with pytest.raises(ValueError, match=r"rank00001\.routing: fingerprint = 'f1': is of another"):
        read_trace(tmp_path)
