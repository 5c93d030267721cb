"""The best claims of every pool: the compiled selection against its reference, and by hand.

Run: pytest tests/unit/ops/test_select_top.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops.select_top import (
    select_grouped,
    select_top,
    select_top_reference,
    select_top_sorted,
)
from engine.ops.sort_by_expert import sort_by_expert


def sort_keys(*columns: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(column, dtype=torch.int32) for column in columns]


def select_top_grouped(words, pool, need):
    order, _, load = sort_by_expert(pool[:, None], need.numel())
    return select_grouped(order, load, need, words)


ALL = [select_top, select_top_reference, select_top_sorted, select_top_grouped]


@pytest.mark.parametrize("select", ALL)
def test_each_pool_keeps_its_largest_sort_keys(select):
    pool = torch.tensor([0, 0, 1, 0, -1, 1])
    keep, tied = select(sort_keys([3, -9, 5, 4, 99, 6]), pool, torch.tensor([2, 1]))
    assert keep.tolist() == [True, False, False, True, False, True]
    assert not tied


@pytest.mark.parametrize("select", ALL)
def test_secondary_keys_break_ties_and_a_tie_that_stays_keeps_none_of_its_claims(select):
    pool = torch.zeros(4, dtype=torch.int64)
    first, second = [7, 7, 7, 9], [1, 3, 2, 0]
    keep, tied = select(sort_keys(first, second), pool, torch.tensor([2]))
    assert keep.tolist() == [False, True, False, True] and not tied
    keep, tied = select(sort_keys(first), pool, torch.tensor([2]))
    assert keep.tolist() == [False, False, False, True] and tied
    keep, tied = select(sort_keys(first), pool, torch.tensor([1]))
    assert keep.tolist() == [False, False, False, True] and not tied, "the tie is below the cut"


@pytest.mark.parametrize("select", ALL)
def test_extreme_sort_keys_and_needs(select):
    low, high = -(2**31), 2**31 - 1
    pool = torch.zeros(3, dtype=torch.int64)
    for need, expected in [(0, [0, 0, 0]), (1, [0, 1, 0]), (2, [0, 1, 1]), (9, [1, 1, 1])]:
        keep, tied = select(sort_keys([low, high, -1]), pool, torch.tensor([need]))
        assert keep.int().tolist() == expected and not tied
    keep, tied = select(sort_keys([]), torch.empty(0, dtype=torch.int64), torch.tensor([3]))
    assert keep.shape == (0,) and not tied


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(-1, 3), st.integers(-2, 2), st.integers(-70000, 70000)), max_size=40
    ),
    st.lists(st.integers(0, 12), min_size=4, max_size=4),
)
def test_the_compiled_and_the_sorting_selection_equal_their_reference(claims, needs):
    pool = torch.tensor([claim[0] for claim in claims], dtype=torch.int64)
    columns = sort_keys([claim[1] for claim in claims], [claim[2] for claim in claims])
    for depth in (1, 2):
        expected, expected_tied = select_top_reference(columns[:depth], pool, torch.tensor(needs))
        for select in (select_top, select_top_sorted, select_top_grouped):
            keep, tied = select(columns[:depth], pool, torch.tensor(needs))
            assert torch.equal(keep, expected) and bool(tied) == bool(expected_tied)


def test_histograms_added_over_slices_give_the_selection_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    column = torch.randint(-50, 50, (90,), generator=generator, dtype=torch.int32)
    other = torch.randperm(90, generator=generator).int()
    pool = torch.randint(0, 3, (90,), generator=generator)
    need = torch.tensor([5, 11, 40])
    whole, _ = select_top_reference([column, other], pool, need)
    slices = [slice(0, 31), slice(31, 90)]
    # Each slice is selected with the other one's histograms, recorded in a first pass over both.
    recorded: list[list[torch.Tensor]] = []

    def run(part: slice, reduce) -> torch.Tensor:
        return select_top_reference([column[part], other[part]], pool[part], need, reduce)[0]

    # Radix is sequential: pass i of a slice needs the sums of passes 0 .. i - 1. Build them up.
    for depth in range(8):
        own: list[torch.Tensor] = []
        for part in slices:
            seen: list[torch.Tensor] = []

            def reduce(histogram: torch.Tensor, seen=seen) -> torch.Tensor:
                seen.append(histogram.clone())
                index = len(seen) - 1
                return recorded[index] if index < len(recorded) else histogram

            run(part, reduce)
            own.append(seen[depth])
        recorded.append(own[0] + own[1])
    parts = []
    for part in slices:
        sums = iter(recorded)
        parts.append(run(part, lambda histogram, sums=sums: next(sums)))
    assert torch.equal(torch.cat(parts), whole)
