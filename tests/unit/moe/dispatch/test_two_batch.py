"""Who runs when two half batches take turns.

Run: pytest tests/unit/moe/dispatch/test_two_batch.py
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.generation.runner import balanced_cut
from engine.moe.dispatch.two_batch import finish, interleave


def talker(name: str, stops: int, said: list[str], fails_at: int | None = None):
    try:
        for number in range(stops):
            said.append(f"{name}{number}")
            if number == fails_at:
                raise FloatingPointError(name)
            yield
        said.append(f"{name} ends")
        return name.upper()
    except GeneratorExit:
        said.append(f"{name} closed")
        raise


def test_parts_go_from_stop_to_stop_in_turn_and_end_at_their_own_time():
    said: list[str] = []
    results = interleave([talker("a", 3, said), talker("b", 1, said), talker("c", 2, said)])
    assert results == ["A", "B", "C"]
    order = ["a0", "b0", "c0", "a1", "b ends", "c1", "a2", "c ends", "a ends"]
    assert said == order


def test_where_one_fails_the_others_are_closed_and_the_failure_is_told():
    said: list[str] = []
    parts = [talker("a", 3, said), talker("b", 3, said, fails_at=1)]
    with pytest.raises(FloatingPointError, match="b"):
        interleave(parts)
    assert said == ["a0", "b0", "a1", "b1", "a closed"]


def test_finish_does_not_leave_at_the_stops():
    said: list[str] = []
    assert finish(talker("a", 2, said)) == "A"
    assert said == ["a0", "a1", "a ends"]


def test_the_worked_example_is_cut_after_the_fourth_piece():
    assert balanced_cut([1, 1, 1, 900, 700]) == 4
    assert (balanced_cut([7]), balanced_cut([])) == (1, 0)
    assert balanced_cut([5, 0, 5]) == 2, "of equal cuts the later"


@given(st.lists(st.integers(1, 50), max_size=12))
def test_no_other_cut_is_more_even(lengths):
    cut = balanced_cut(lengths)
    uneven = [abs(sum(lengths[:at]) - sum(lengths[at:])) for at in range(len(lengths) + 1)]
    assert uneven[cut] == min(uneven)
