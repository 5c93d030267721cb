"""Who holds what: expert ranges and the layout of groups.

python -m pytest tests/unit/distributed/test_groups.py
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.distributed.groups import expert_range, layout


def test_seven_experts_on_three_ranks_by_hand():
    assert [expert_range(7, 3, rank) for rank in range(3)] == [(0, 3), (3, 2), (5, 2)]


def test_more_ranks_than_experts_leaves_the_last_ranks_empty():
    assert [expert_range(2, 4, rank) for rank in range(4)] == [(0, 1), (1, 1), (2, 0), (2, 0)]


@given(num_experts=st.integers(1, 300), size=st.integers(1, 80))
def test_ranges_tile_the_experts_in_order_and_differ_by_one_at_most(num_experts, size):
    ranges = [expert_range(num_experts, size, rank) for rank in range(size)]
    assert [e for first, count in ranges for e in range(first, first + count)] == list(
        range(num_experts)
    )
    counts = [count for _, count in ranges]
    assert counts == sorted(counts, reverse=True) and counts[0] - counts[-1] <= 1


def test_layout_of_eight_ranks_by_hand():
    place = layout(rank=5, world_size=8, expert=4, tensor=2)
    assert (place.expert, place.tensor) == ((4, 5, 6, 7), (4, 5))
    assert (place.data_rank, place.num_data) == (2, 4)
    assert (place.replica, place.num_replicas) == (1, 2)


@pytest.mark.parametrize(("world", "expert", "tensor"), [(1, 1, 1), (12, 6, 2), (8, 8, 8)])
def test_all_members_of_a_group_agree_on_it(world, expert, tensor):
    places = [layout(rank, world, expert, tensor) for rank in range(world)]
    for rank, place in enumerate(places):
        assert rank in place.expert and rank in place.tensor
        assert all(places[other].expert == place.expert for other in place.expert)
        assert all(places[other].tensor == place.tensor for other in place.tensor)
        assert set(place.tensor) <= set(place.expert)
