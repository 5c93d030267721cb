"""Rows that are sent once per rank, in fewer bits, or in chunks end up where plain rows do.

Run: pytest tests/unit/moe/dispatch/test_payload.py
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import DispatchConfig
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.dispatch.payload import packed_offsets
from engine.moe.dispatch.row_format import RowFormats
from tests.helpers.bounds import bounds
from tests.helpers.in_process_ranks import call

WIDTH = 24


def rows_of(dtype: torch.dtype = torch.float32, name: str = "auto", partial: bool = False):
    return RowFormats.of(WIDTH, dtype, DispatchConfig(dtype=name, partial_sums=partial))


def draw(
    num_ranks: int,
    num_experts: int,
    columns: int,
    tokens: list[int],
    seed: int,
    dropped: float = 0.3,
    dtype: torch.dtype = torch.float32,
):
    """ids, rows and weights of every rank."""
    generator = torch.Generator().manual_seed(seed)
    ids, xs, ws = [], [], []
    for rank in range(num_ranks):
        count = tokens[rank]
        part = torch.rand(count, num_experts, generator=generator).argsort(1)[:, :columns]
        gone = torch.rand(part.shape, generator=generator) < dropped
        ids.append(part.masked_fill(gone, -1))
        xs.append(torch.randn(count, WIDTH, generator=generator).to(dtype))
        ws.append(torch.rand(count, columns, generator=generator).masked_fill(gone, 0.0))
    return ids, xs, ws


def test_wire_areas_follow_the_worked_example():
    assert packed_offsets([32, 16, 64], [64, 32, 16]) == ([0, 64, 96], 112)
    assert packed_offsets([10, 10], [3, 40]) == ([0, 16], 56), "areas begin at multiples of 16"
    assert packed_offsets([], []) == ([], 0)


@given(
    num_ranks=st.integers(1, 4),
    num_experts=st.integers(4, 21),
    columns=st.integers(1, 4),
    chunks=st.integers(1, 5),
    by=st.sampled_from(["experts", "tokens"]),
    tokens=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    late=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_unique_rows_give_what_a_row_an_assignment_gives_bit_for_bit(
    num_ranks, num_experts, columns, chunks, by, tokens, late, dtype, seed
):
    starts = bounds(num_experts, num_ranks)
    ids, xs, ws = draw(num_ranks, num_experts, columns, tokens, seed, dtype=dtype)
    plain = call(ExpertLayout(starts, 1), ids, xs, ws)
    rows = rows_of(dtype)
    for deduplicate in (False, True):
        layout = ExpertLayout(starts, chunks, by, rows, deduplicate=deduplicate)
        found = call(layout, ids, xs, ws, late=late)
        for out, expected in zip(found.outs, plain.outs, strict=True):
            assert torch.equal(out, expected)
        assert found.sent[0] <= plain.sent[0], "unique rows are only sent where they are less"
        assert found.sent[1] == plain.sent[1]


def all_on_one_rank(num_tokens: int, columns: int = 4):
    """Two ranks of 8 experts each; tokens of rank 0 choose experts of rank 1 alone."""
    ids = torch.rand(num_tokens, 8).argsort(1)[:, :columns] + 8
    x = torch.randn(num_tokens, WIDTH)
    w = torch.rand(num_tokens, columns)
    empty = torch.zeros(0, columns, dtype=torch.int64)
    return [ids, empty], [x, x[:0]], [w, w[:0]]


def test_rows_of_four_experts_on_one_rank_are_dispatched_once_and_combined_four_times():
    ids, xs, ws = all_on_one_rank(10)
    layout = ExpertLayout([0, 8, 16], 1, "experts", rows_of(), deduplicate=True)
    found = call(layout, ids, xs, ws)
    row = WIDTH * 4
    assert found.sent == (10 * (row + 16), 40 * row), "16 bytes for the bitmap"
    assert found.plans[0][0].unique is not None and found.plans[1][0].unique is not None


def test_partial_sums_combine_one_row_per_token_and_rank():
    ids, xs, ws = all_on_one_rank(10)
    exact = call(ExpertLayout([0, 8, 16], 1), ids, xs, ws)
    rows = rows_of(partial=True)
    for chunks in (1, 3):
        layout = ExpertLayout([0, 8, 16], chunks, "tokens", rows, deduplicate=True)
        found = call(layout, ids, xs, ws)
        row = WIDTH * 4
        assert found.sent == (10 * (row + 8 * 4 + 16), 10 * row), "8 weights and the bitmap"
        torch.testing.assert_close(found.outs[0], exact.outs[0], rtol=1e-5, atol=1e-6)


@given(
    num_ranks=st.integers(2, 4),
    num_experts=st.integers(8, 21),
    chunks=st.integers(1, 4),
    by=st.sampled_from(["experts", "tokens"]),
    tokens=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    late=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_partial_sums_differ_from_the_whole_sum_by_rounding_alone(
    num_ranks, num_experts, chunks, by, tokens, late, seed
):
    starts = bounds(num_experts, num_ranks)
    ids, xs, ws = draw(num_ranks, num_experts, 6, tokens, seed)
    exact = call(ExpertLayout(starts, 1), ids, xs, ws)
    layout = ExpertLayout(starts, chunks, by, rows_of(partial=True), deduplicate=True)
    found = call(layout, ids, xs, ws, late=late)
    for out, expected in zip(found.outs, exact.outs, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    if found.plans[0][0].pre_reduced:
        assert found.sent[1] <= exact.sent[1]


def test_a_token_that_keeps_nothing_gets_exactly_zero_from_partial_sums():
    ids, xs, ws = all_on_one_rank(10)
    ids[0][3] = -1
    layout = ExpertLayout([0, 8, 16], 1, "experts", rows_of(partial=True), deduplicate=True)
    found = call(layout, ids, xs, ws)
    assert found.plans[0][0].pre_reduced and not found.outs[0][3].any()
    assert found.outs[0][4].any()


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize(
    ("name", "bound", "payload"), [("bf16", 2**-8, 2 * WIDTH), ("fp8", 2**-4, WIDTH + 4)]
)
def test_narrow_rows_move_fewer_bytes_and_err_within_their_mantissa(
    name, bound, payload, deduplicate
):
    ids, xs, ws = draw(2, 16, 4, [40, 23], 5, dropped=0.1)
    exact = call(ExpertLayout([0, 8, 16], 1), ids, xs, ws)
    narrow = rows_of(name=name)
    layout = ExpertLayout([0, 8, 16], 2, "tokens", narrow, deduplicate=deduplicate)
    found = call(layout, ids, xs, ws)
    assert (found.plans[0][0].unique is not None) == deduplicate
    rows = exact.sent[0] // (WIDTH * 4)
    if deduplicate:
        assert found.sent[0] < rows * (payload + 15)
    else:
        assert found.sent[0] == rows * (-(-payload // 16) * 16)
    assert found.sent[1] == exact.sent[1], "combined rows have the compute dtype"
    for out, expected, x, w, part in zip(found.outs, exact.outs, xs, ws, ids, strict=True):
        # An element errs by at most bound of its row's largest; tanh does not widen that, expert e
        # multiplies by e + 2.
        reach = bound * x.abs().amax(1, keepdim=True)
        factor = (w * (part + 2)).sum(1, keepdim=True)
        assert ((out - expected).abs() <= reach * factor + 1e-6).all()
        assert not torch.equal(out, expected)


def test_one_rank_keeps_its_rows_as_they_are():
    ids, xs, ws = draw(1, 6, 2, [9], 1)
    layout = ExpertLayout([0, 6], 3, "tokens", rows_of(name="fp8"), deduplicate=True)
    found = call(layout, ids, xs, ws)
    assert found.plans[0][0].row_format is None and len(found.plans[0]) == 1
    assert torch.equal(found.outs[0], call(ExpertLayout([0, 6], 1), ids, xs, ws).outs[0])
