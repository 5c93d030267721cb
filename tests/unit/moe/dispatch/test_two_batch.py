"""The order in which two micro-batches run, and where a step is cut into them.

Run: pytest tests/unit/moe/dispatch/test_two_batch.py
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.generation.runner import balanced_cut
from engine.moe.dispatch.two_batch import interleave, run_to_end


def steps(name: str, yields: int, ran: list[str], fails_at: int | None = None):
    try:
        for number in range(yields):
            ran.append(f"{name}{number}")
            if number == fails_at:
                raise FloatingPointError(name)
            yield
        ran.append(f"{name} ends")
        return name.upper()
    except GeneratorExit:
        ran.append(f"{name} closed")
        raise


def test_micro_batches_alternate_at_their_yield_points_and_end_at_their_own_time():
    ran: list[str] = []
    results = interleave([steps("a", 3, ran), steps("b", 1, ran), steps("c", 2, ran)])
    assert results == ["A", "B", "C"]
    order = ["a0", "b0", "c0", "a1", "b ends", "c1", "a2", "c ends", "a ends"]
    assert ran == order


def test_where_one_fails_the_others_are_closed_and_its_error_is_raised():
    ran: list[str] = []
    parts = [steps("a", 3, ran), steps("b", 3, ran, fails_at=1)]
    with pytest.raises(FloatingPointError, match="b"):
        interleave(parts)
    assert ran == ["a0", "b0", "a1", "b1", "a closed"]


def test_run_to_end_does_not_return_at_the_yield_points():
    ran: list[str] = []
    assert run_to_end(steps("a", 2, ran)) == "A"
    assert ran == ["a0", "a1", "a ends"]


def test_the_worked_example_is_cut_after_the_fourth_slice():
    assert balanced_cut([1, 1, 1, 900, 700]) == 4
    assert (balanced_cut([7]), balanced_cut([])) == (1, 0)
    assert balanced_cut([5, 0, 5]) == 2, "of equal cuts the later"


@given(st.lists(st.integers(1, 50), max_size=12))
def test_no_other_cut_is_more_even(lengths):
    cut = balanced_cut(lengths)
    uneven = [abs(sum(lengths[:at]) - sum(lengths[at:])) for at in range(len(lengths) + 1)]
    assert uneven[cut] == min(uneven)
