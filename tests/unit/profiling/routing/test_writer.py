"""engine/profiling/routing/writer.py: appends, thins when it is full, continues what a job left.

Run: pytest tests/unit/profiling/routing/test_writer.py
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.profiling.routing.trace import (
    read_trace,
)
from engine.profiling.routing.trace_file import (
    CLAIMS,
    LOADS,
    TraceError,
    TraceHeader,
    trace_path,
)
from engine.profiling.routing.writer import TraceEnd, TraceWriter, find_end, min_bytes

HEADER = TraceHeader(
    kind=LOADS,
    rank=0,
    host="h",
    model="m",
    fingerprint="f0",
    layers=[1, 3],
    num_experts=4,
    top_k=2,
)
RECORD = 4 * (6 + 8)
LARGE = 1 << 20


def append(writer: TraceWriter, index: int, segment: int = 1) -> None:
    """One step, whose loads are its index everywhere."""
    columns = (segment, index, index + 1, 5, 3, 2)
    writer.append(np.array([*columns, *[index] * 8], dtype="<i4").tobytes(), columns)


def write(folder: Path, steps: range, max_bytes: int = LARGE, segment: int = 1) -> TraceWriter:
    writer = TraceWriter(folder, HEADER, max_bytes)
    for index in steps:
        append(writer, index, segment)
    writer.close()
    return writer


def test_what_is_written_is_read_again(tmp_path):
    assert write(tmp_path, range(3)).num_written == 3
    trace = read_trace(tmp_path)
    assert trace.loads_SLE.dtype == np.int64 and trace.loads_SLE.shape == (3, 2, 4)
    assert trace.loads_SLE[:, 1, 2].tolist() == [0, 1, 2]
    assert trace.steps_S.tolist() == [1, 2, 3] and trace.segments_S.tolist() == [1, 1, 1]
    assert trace.tokens_S2.tolist() == [[5, 3]] * 3 and trace.ranks_S.tolist() == [2, 2, 2]
    assert (trace.layers, trace.num_experts, trace.top_k, trace.every) == ((1, 3), 4, 2, 1)
    assert (trace.model, trace.fingerprint) == ("m", "f0")
    assert list(trace.claims()) == []


@pytest.mark.parametrize("num_steps", [1, 7, 50, 333])
def test_a_full_file_keeps_steps_with_even_gaps_within_the_bound(tmp_path, num_steps):
    bound = min_bytes(HEADER) + 20 * RECORD
    writer = TraceWriter(tmp_path, HEADER, bound)
    path, largest = trace_path(tmp_path, LOADS, 0), 0
    for index in range(num_steps):
        append(writer, index)
        largest = max(largest, path.stat().st_size)
    writer.close()
    assert largest <= bound * 2 / 3, "half as much must fit beside it while it is thinned"
    trace = read_trace(tmp_path)
    assert trace.every & (trace.every - 1) == 0
    kept = list(range(0, num_steps, trace.every))
    assert (trace.steps_S - 1).tolist() == kept
    assert trace.loads_SLE[:, 0, 0].tolist() == kept
    assert writer.num_written == len(kept)
    assert len(kept) > 3 or trace.every == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_bound_that_holds_one_step_keeps_the_first(tmp_path):
    write(tmp_path, range(40), min_bytes(HEADER))
    assert read_trace(tmp_path).steps_S.tolist() == [1]


def test_a_record_cut_off_anywhere_loses_that_step_alone(tmp_path):
    write(tmp_path, range(3))
    path = trace_path(tmp_path, LOADS, 0)
    whole = path.read_bytes()
    for lost in range(1, RECORD + 1):
        path.write_bytes(whole[:-lost])
        assert read_trace(tmp_path).steps_S.tolist() == [1, 2], lost
    for lost in (1, 9, RECORD - 1):  # a job that resumes continues behind the last whole record
        path.write_bytes(whole[:-lost])
        end, _ = find_end(tmp_path, LOADS, 0)
        assert end == TraceEnd(1, 1, 1)
        write(tmp_path, range(2, 4), segment=2)
        trace = read_trace(tmp_path)
        assert trace.segments_S.tolist() == [1, 1, 2, 2] and trace.steps_S.tolist() == [1, 2, 3, 4]


def test_zeros_at_the_end_are_no_steps(tmp_path):
    write(tmp_path, range(2))
    path = trace_path(tmp_path, LOADS, 0)
    path.write_bytes(path.read_bytes() + bytes(3 * RECORD))
    assert read_trace(tmp_path).steps_S.tolist() == [1, 2]
    assert find_end(tmp_path, LOADS, 0)[0] == TraceEnd(1, 1, 1)


def test_a_resumed_job_keeps_the_thinning_and_its_first_step(tmp_path):
    bound = min_bytes(HEADER) + 20 * RECORD
    every = write(tmp_path, range(100), bound).header.every
    before = read_trace(tmp_path)
    end, _ = find_end(tmp_path, LOADS, 0)
    assert end.every == every > 1 and end.next_index % every == 0 and end.next_index > end.index
    write(tmp_path, range(end.next_index, end.next_index + 1), bound, segment=2)
    trace = read_trace(tmp_path)
    assert trace.steps_S[:-1].tolist() == before.steps_S.tolist()
    assert trace.segments_S[-1] == 2


def test_thinning_reaches_the_steps_of_earlier_segments(tmp_path):
    bound = min_bytes(HEADER) + 20 * RECORD
    write(tmp_path, range(15), bound)
    writer = write(tmp_path, range(15, 80), bound, segment=2)
    trace = read_trace(tmp_path)
    assert (trace.steps_S - 1).tolist() == list(range(0, 80, trace.every)) and trace.every > 1
    assert (trace.segments_S == 2).sum() == writer.num_written


def test_two_jobs_do_not_record_into_one_file(tmp_path):
    writer = TraceWriter(tmp_path, HEADER, LARGE)
    with pytest.raises(TraceError, match="another job is recording into it; name a folder"):
        TraceWriter(tmp_path, HEADER, LARGE)
    writer.close()
    TraceWriter(tmp_path, HEADER, LARGE).close()


@pytest.mark.parametrize(
    ("field", "value"), [("fingerprint", "f1"), ("layers", [1]), ("num_experts", 5), ("top_k", 1)]
)
def test_another_model_is_refused_and_changes_nothing(tmp_path, field, value):
    write(tmp_path, range(3))
    before = trace_path(tmp_path, LOADS, 0).read_bytes()
    with pytest.raises(TraceError) as caught:
        TraceWriter(tmp_path, replace(HEADER, **{field: value}), LARGE)
    assert f"loads.rank00000.routing: {field} = " in str(caught.value)
    assert "of another model" in str(caught.value) and "folder of its own" in str(caught.value)
    assert trace_path(tmp_path, LOADS, 0).read_bytes() == before


def test_a_step_that_can_never_fit_is_left_out_with_one_warning(tmp_path, caplog):
    header = replace(HEADER, kind=CLAIMS)
    writer = TraceWriter(tmp_path, header, 1500)
    small, large = (1, 0, 1, 0, 1, 0), (1, 1, 2, 0, 1, 90)
    zeros = np.zeros(2, dtype="<i4").tobytes()
    writer.append(np.array(small, dtype="<i4").tobytes() + zeros, small)
    for _ in range(2):
        writer.append(np.array(large, dtype="<i4").tobytes() + zeros + bytes(90 * 25), large)
    writer.close()
    assert writer.num_written == 1 and find_end(tmp_path, CLAIMS, 0)[0] == TraceEnd(1, 0, 1)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 1 and texts[0].startswith("profiler.routing_mib: a step of 2282 bytes")


def test_a_failed_write_is_logged_once_and_the_job_goes_on(tmp_path, caplog):
    path = trace_path(tmp_path, LOADS, 0)
    write(tmp_path, range(2))
    writer = TraceWriter(tmp_path, HEADER, LARGE)
    writer._file.close()
    writer._file = open("/dev/full", "ab", buffering=0)
    with caplog.at_level(logging.WARNING):
        for index in range(2, 5):
            append(writer, index, segment=2)
    assert [record.getMessage() for record in caplog.records] == [
        f"profiler.routing: {path}: No space left on device; the job goes on, later steps are "
        "missing there"
    ]
    assert not writer.keeps(8) and read_trace(tmp_path).steps_S.tolist() == [1, 2]
