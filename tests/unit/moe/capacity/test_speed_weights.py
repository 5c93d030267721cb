"""SpeedWeights of the capacity by measured speed: pure numbers, and what a layer keeps under them.

Run: pytest tests/unit/moe/capacity/test_speed_weights.py
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import CapacityConfig
from engine.generation.memory import MoEShape, row_bound
from engine.moe.capacity.limits import Pools
from engine.moe.capacity.speed_weights import (
    MAX_WEIGHT,
    MIN_WEIGHT,
    ONE,
    UPDATE_EVERY,
    SpeedWeights,
    limits,
    speed_weights,
)
from engine.profiling.phase_clock import Phase
from engine.profiling.row_time import RowTime
from tests.helpers.profiles import make_spans

TWO_RANKS = [0, 4, 8]


def test_the_worked_example():
    found = speed_weights([100, 200])
    assert found == (ONE * 4 // 3, ONE * 2 // 3)
    assert limits(Pools.make("rank", TWO_RANKS), 6, found) == [32, 16]
    assert limits(Pools.make("expert", TWO_RANKS), 6, found) == [8] * 4 + [4] * 4


def test_a_rank_among_eight_that_is_half_as_fast_gets_half_of_what_the_others_get():
    found = speed_weights([100] * 7 + [200])
    assert found is not None
    assert found[7] * 2 == pytest.approx(found[0], abs=2) and len(set(found[:7])) == 1
    assert sum(found) == pytest.approx(8 * ONE, abs=8)


def test_unknown_or_equal_paces_leave_the_capacity_as_it_is():
    assert speed_weights([100, 0]) is None and speed_weights([0, 0]) is None
    assert speed_weights([7, 7, 7]) is None
    assert speed_weights([100, 105]) is None and speed_weights([100, 106]) is not None
    pools = Pools.make("rank", TWO_RANKS)
    assert limits(pools, 6, None) == [24, 24] == limits(pools, 6, (ONE, ONE))


@given(
    st.lists(st.integers(1, 10**9), min_size=2, max_size=9),
    st.integers(1, 300),
    st.sampled_from(["expert", "rank"]),
    st.data(),
)
def test_the_sum_of_the_slots_is_kept_and_every_share_is_bounded(paces, capacity, scope, data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=len(paces), max_size=len(paces)))
    pools = Pools.make(scope, [0, *np.cumsum(sizes).tolist()])
    found = speed_weights(paces)
    slots = limits(pools, capacity, found)
    assert min(slots) >= 1
    even = sum(pools.sizes) * capacity
    lifted = slots.count(1)
    assert even <= sum(slots) <= even + lifted, "only a pool that would have none adds a slot"
    if found is not None:
        assert all(MIN_WEIGHT <= share <= MAX_WEIGHT for share in found)
        slower = [a for a in range(len(paces)) for b in range(len(paces)) if paces[a] > paces[b]]
        faster = [b for a in range(len(paces)) for b in range(len(paces)) if paces[a] > paces[b]]
        assert all(found[a] <= found[b] for a, b in zip(slower, faster, strict=True))


def test_the_worked_example_of_one_rank_a_hundred_times_as_fast_as_seven_holds():
    found = speed_weights([1] + [100] * 7)
    assert limits(Pools.make("rank", list(range(9))), 12, found) == [24, *[11] * 2, *[10] * 5]


@given(
    st.lists(st.integers(1, 10**9), min_size=1, max_size=16),
    st.integers(1, 10**5),
    st.sampled_from(["expert", "rank"]),
    st.booleans(),
    st.data(),
)
def test_no_rank_gets_more_than_the_most_that_memory_is_reserved_for(
    numbers, capacity, scope, paced, data
):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=len(numbers), max_size=len(numbers)))
    pools = Pools.make(scope, [0, *np.cumsum(sizes).tolist()])
    # What `shares` makes of paces, or anything within its bounds.
    bounded = tuple(MIN_WEIGHT + number % (MAX_WEIGHT - MIN_WEIGHT + 1) for number in numbers)
    slots = limits(pools, capacity, found := speed_weights(numbers) if paced else bounded)
    assert slots == limits(pools, capacity, found), "every rank works the same out"
    owned = np.bincount(pools.owners, weights=slots).astype(int)
    assert (owned * ONE <= np.array(sizes) * capacity * MAX_WEIGHT).all()
    even = sum(sizes) * capacity
    assert even <= sum(slots) <= even + slots.count(1), "what is cut off goes to the others"
    weights = found or (ONE,) * len(numbers)
    order = np.argsort(weights, kind="stable")
    rates = (owned / np.array(sizes))[order]
    assert (np.diff(rates) >= -1).all(), "but for rounding, a larger share is never worth less"


def test_memory_is_reserved_for_shares_and_for_the_rounding_of_every_rank():
    shape = MoEShape(num_ranks=4, top_k=2, num_experts=8, num_local_experts=2, hidden=8, ffn=8)
    local = CapacityConfig(policy="token_drop", factor="0.5", consensus="local", speed_aware=True)
    own_capacity = 3  # of 17 tokens: ceil(0.5 * 17 * 2 / 8)
    fastest = limits(
        Pools.make("rank", [0, 2, 4, 6, 8]), own_capacity, (MAX_WEIGHT, *[MIN_WEIGHT] * 3)
    )[0]
    assert row_bound(shape, local, max_tokens=17, max_sequences=0).received >= 4 * fastest == 48


def test_shares_change_every_few_steps_and_say_when_it_matters():
    kept = SpeedWeights()
    assert [kept.update([100, 200]) for _ in range(UPDATE_EVERY)] == [False] * (
        UPDATE_EVERY - 1
    ) + [True]
    assert kept.current == speed_weights([100, 200])
    assert not any(kept.update([100, 202]) for _ in range(UPDATE_EVERY)), "a hundredth is no news"
    assert kept.current == speed_weights([100, 202])
    assert any(kept.update([100, 100]) for _ in range(UPDATE_EVERY)) and kept.current is None


def test_pace_is_time_a_row_of_calls_with_enough_rows():
    pace = RowTime()
    assert pace.picoseconds_per_row == 0
    pace.add(make_spans((Phase.EXPERTS, 0, 0, 5, 8)))
    assert pace.picoseconds_per_row == 0, "eight rows are bound by reading weights"
    pace.add(make_spans((Phase.EXPERTS, 0, 0, 5, 100), (Phase.EXPERTS, 0, 5, 6)))
    assert pace.picoseconds_per_row == 50_000_000
    for _ in range(30):
        pace.add(make_spans((Phase.EXPERTS, 0, 0, 10, 100)))
    assert pace.picoseconds_per_row == pytest.approx(100_000_000, rel=0.02)


def test_pace_is_learnt_from_complete_steps_alone():
    pace = RowTime()
    pace.add(make_spans((Phase.EXPERTS, 0, 0, 5, 100)))
    pace.add(replace(make_spans((Phase.EXPERTS, 0, 0, 0, 100)), complete=False))
    assert pace.picoseconds_per_row == 50_000_000
