"""engine/simulate/fit.py: planted costs are found from made span files, outliers and noise aside.

Run: pytest tests/unit/simulate/test_fit.py
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from engine.profiling.phase_clock import Phase
from engine.profiling.span_file import SpanFileHeader, span_path
from engine.simulate.cost_model import ExpertLine, Hop, Line
from engine.simulate.device_file import read_device, write_device
from engine.simulate.fit import fit_costs, fit_experts, fit_line
from engine.simulate.spans import read_calls

ATTENTION = Line(fixed=4e-4, per_token=9e-6)
GATE = Line(fixed=5e-5, per_token=4e-7)
PLAN = Line(fixed=2e-4, per_token=8e-7)
EXPERT = ExpertLine(fixed=1.5e-4, per_row=6e-6, read_rows=20)
CONSENSUS, DISPATCH = Hop(alpha=6e-5), Hop(alpha=9e-5, beta=2e-10, per_row=3e-8)
COMBINE = Hop(alpha=7e-5, beta=3e-10, per_row=2e-8)
EXPERTS_PER_RANK, ROW_BYTES = 4, 1024


def write_spans(folder: Path, *, chunks: int = 1, steps: int = 60, ranks: int = 2) -> None:
    """Spans of one layer; ranks wait for the later one."""
    random = np.random.default_rng(3)
    folder.mkdir()
    lines: list[list[str]] = [[] for _ in range(ranks)]
    for step in range(steps):
        tokens_W = random.integers(1, 2000, ranks)
        # Rows stay where they are but for what a rank sends to the next one.
        rows_We = random.multinomial(2 * tokens_W.sum(), [0.5, 0.2, 0.2, 0.1], ranks) // ranks
        moved = int(random.integers(0, 1000)) * ROW_BYTES
        sent, back = int(2 * tokens_W.max()), int(rows_We.sum(1).max())
        local_W = np.array([ATTENTION.of(t) + GATE.of(t) + PLAN.of(t) for t in tokens_W])
        experts_W = np.array([EXPERT.of(rows_e) for rows_e in rows_We])
        for rank in range(ranks):
            spans, now = [], 0

            def add(phase, seconds, tokens=0, num_bytes=0, waited=0.0, spans=spans):
                nonlocal now
                duration = round(seconds * 1e9)
                entry = [int(phase), 5, now, duration, int(tokens), int(num_bytes)]
                spans.append([*entry, round(waited * 1e9)])
                now += duration

            tokens = int(tokens_W[rank])
            late = local_W.max() - local_W[rank]
            add(Phase.ATTENTION, ATTENTION.of(np.array(tokens)), tokens)
            add(Phase.GATE, GATE.of(np.array(tokens)), tokens)
            add(Phase.PLAN, PLAN.of(np.array(tokens)))
            add(Phase.CONSENSUS, CONSENSUS.of(64) + late, 0, 64, late)
            for _ in range(chunks):
                add(Phase.DISPATCH, DISPATCH.of(moved, sent) / chunks, 2 * tokens, moved)
            add(Phase.EXPERTS, experts_W[rank], rows_We[rank].sum())
            late = experts_W.max() - experts_W[rank]
            add(Phase.COMBINE, COMBINE.of(moved, back) + late, rows_We[rank].sum(), moved, late)
            spans.append([int(Phase.CONTROL), -1, now, 10, 0, 0, 0])
            after = {"5": rows_We[rank].tolist()}
            line = {"step": step, "start_ns": 0, "prefill": tokens, "decode": 0}
            lines[rank].append(json.dumps(line | {"spans": spans, "before": {}, "after": after}))
    for rank in range(ranks):
        header = SpanFileHeader(
            rank=rank, host="here", world_size=ranks, group=list(range(ranks)),
            clock_offset_ns=0, clock_error_ns=0, num_layers=1,
            num_experts=ranks * EXPERTS_PER_RANK, own_experts={}, num_homes={}, num_copies={},
            policy="none",
        )  # fmt: skip
        text = "\n".join([json.dumps(asdict(header)), *lines[rank], ""])
        span_path(folder, rank).write_text(text)


def test_planted_costs_are_found_and_survive_a_device_file(tmp_path):
    write_spans(tmp_path / "spans")
    calls = read_calls(tmp_path / "spans")
    assert len(calls) == 58  # without the first two steps
    found = fit_costs(calls, "made", "made spans", 2)
    for got, planted in (
        (found.attention, ATTENTION), (found.gate, GATE), (found.plan, PLAN),
        (found.consensus, CONSENSUS), (found.dispatch, DISPATCH), (found.combine, COMBINE),
    ):  # fmt: skip
        assert asdict(got) == pytest.approx(asdict(planted), rel=0.02, abs=1e-12)
    assert found.experts.per_row == pytest.approx(EXPERT.per_row, rel=0.02)
    assert found.experts.fixed == pytest.approx(EXPERT.fixed, rel=0.1)
    write_device(found, tmp_path / "made.yaml")
    read = read_device(str(tmp_path / "made.yaml"))
    assert read.costs == found and not read.assumed and read.name == "made"


def test_reading_weights_and_the_least_time_are_told_from_rows():
    random = np.random.default_rng(5)
    planted = ExpertLine(least=4e-4, fixed=1e-4, per_row=2e-6, read_rows=64)
    rows = [random.integers(0, size, 4) for size in np.geomspace(3, 3000, 300).astype(int)]
    rows = [each for each in rows if each.sum()]
    seconds_N = np.array([planted.of(each) for each in rows])
    noisy_N = seconds_N * random.normal(1, 0.01, len(rows))
    found = fit_experts(rows, noisy_N)
    error_N = np.array([found.of(each) for each in rows]) / seconds_N - 1
    assert np.abs(error_N).max() < 0.05
    assert found.read_rows == pytest.approx(64, rel=0.2)
    assert found.least == pytest.approx(4e-4, rel=0.05)


def test_single_calls_that_were_disturbed_do_not_change_a_line():
    random = np.random.default_rng(7)
    x_N = random.uniform(1, 1000, 200)
    seconds_N = 1e-4 + 1e-6 * x_N
    seconds_N[::20] *= 8
    fixed, per_token = fit_line(np.stack((np.ones_like(x_N), x_N), 1), seconds_N)
    assert (fixed, per_token) == pytest.approx((1e-4, 1e-6), rel=0.02)


def test_coefficients_are_never_negative():
    x_N = np.linspace(1, 10, 20)
    found = fit_line(np.stack((np.ones_like(x_N), x_N), 1), 5.0 - 0.3 * x_N)
    assert min(found) == 0.0 < max(found)


def test_jobs_with_chunks_and_broken_files_are_refused_in_words(tmp_path):
    write_spans(tmp_path / "chunks", chunks=2)
    with pytest.raises(ValueError, match=r"moe\.overlap\.chunks=1"):
        read_calls(tmp_path / "chunks")
    write_spans(tmp_path / "lost")
    span_path(tmp_path / "lost", 1).unlink()
    with pytest.raises(ValueError, match="the spans of rank 1 are missing"):
        read_calls(tmp_path / "lost")
    write_spans(tmp_path / "short", steps=2)
    with pytest.raises(ValueError, match="no complete steps"):
        read_calls(tmp_path / "short")
    span_path(tmp_path / "short", 0).write_text("{}\n")
    with pytest.raises(ValueError, match="no span file of version"):
        read_calls(tmp_path / "short")


def test_a_line_that_was_cut_off_ends_a_file(tmp_path):
    write_spans(tmp_path / "spans", steps=6)
    path = span_path(tmp_path / "spans", 0)
    path.write_text(path.read_text()[:-40])
    assert [call.step for call in read_calls(tmp_path / "spans")] == [2, 3, 4]
