"""gather_rows and combine_rows: hand-worked indices, absent slots, fixed order of the sum.

Run: python -m pytest tests/unit/ops/test_permute.py
"""

import pytest
import torch

from engine.ops.permute import combine_rows, combine_rows_reference, gather_rows
from tests.helpers.ops_cases import each_isa, needs_native, on_isa


def test_gather_takes_rows_in_the_order_of_the_index():
    x = torch.arange(8.0).view(4, 2)
    assert gather_rows(x, torch.tensor([2, 0, 2])).tolist() == [[4, 5], [0, 1], [4, 5]]
    assert gather_rows(x, torch.empty(0, dtype=torch.int64)).shape == (0, 2)
    buffer = torch.full((5, 2), -1.0)
    assert gather_rows(x, torch.tensor([1, 1]), buffer[:2]).data_ptr() == buffer.data_ptr()
    assert buffer[:3].tolist() == [[2, 3], [2, 3], [-1, -1]]


def test_combine_adds_the_weighted_rows_of_each_token():
    rows = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    slot = torch.tensor([[0, 2], [1, -1], [-1, -1]])
    weights = torch.tensor([[0.5, 0.25], [2.0, 9.0], [9.0, 9.0]])
    assert combine_rows(rows, slot, weights).tolist() == [[25.5, 51.0], [20.0, 40.0], [0.0, 0.0]]


def test_an_absent_slot_contributes_nothing_even_next_to_rows_that_are_not_finite():
    rows = torch.full((2, 3), float("nan"))
    slot, weights = torch.full((4, 2), -1), torch.full((4, 2), float("inf"))
    assert not combine_rows(rows, slot, weights).any()
    assert not combine_rows(rows[:0], slot, weights).any()


@each_isa
@pytest.mark.parametrize("dim", [1, 16, 37, 512])
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (9, 8), (300, 2)])
def test_combine_matches_the_reference(isa, dim, tokens, top_k):
    rows = torch.randn(tokens * top_k + 3, 2 * dim)[:, :dim]
    slot = torch.randint(-1, tokens * top_k + 3, (tokens, top_k))
    weights = torch.rand(tokens, top_k)
    with on_isa(isa):
        got = combine_rows(rows, slot, weights)
    torch.testing.assert_close(
        got, combine_rows_reference(rows, slot, weights), rtol=1e-5, atol=1e-6
    )


@each_isa
def test_the_sum_runs_in_order_of_k(isa):
    # 2^24 + 1 - 2^24 is 0 in float32 in this order and 1 in another.
    rows = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])
    slot = torch.tensor([[0, 1, 2], [0, 2, 1]])
    with on_isa(isa):
        assert combine_rows(rows, slot, torch.ones(2, 3)).tolist() == [[0.0], [1.0]]


def test_half_precision_rows_are_summed_in_float32():
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    got = combine_rows(rows, torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    assert got.dtype == torch.bfloat16 and got.item() == 258.0


@needs_native
def test_a_slot_past_the_rows_is_refused():
    with pytest.raises(RuntimeError, match="slot 2 of 2"):
        combine_rows(torch.ones(2, 4), torch.tensor([[2]]), torch.ones(1, 1))
