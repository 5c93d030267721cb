"""Which rank owns what: expert ranges and the layout of groups.

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
    own = layout(rank=5, world_size=8, expert=4, tensor=2)
    assert (own.expert, own.tensor) == ((4, 5, 6, 7), (4, 5))
    assert (own.data_rank, own.num_data) == (2, 4)
    assert own.replica == 1


@pytest.mark.parametrize(("world", "expert", "tensor"), [(1, 1, 1), (12, 6, 2), (8, 8, 8)])
def test_all_members_of_a_group_agree_on_it(world, expert, tensor):
    layouts = [layout(rank, world, expert, tensor) for rank in range(world)]
    for rank, own in enumerate(layouts):
        assert rank in own.expert and rank in own.tensor
        assert all(layouts[other].expert == own.expert for other in own.expert)
        assert all(layouts[other].tensor == own.tensor for other in own.tensor)
        assert set(own.tensor) <= set(own.expert)
