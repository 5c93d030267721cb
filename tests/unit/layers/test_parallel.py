"""Which heads a tensor rank owns. Run: python -m pytest tests/unit/layers/test_parallel.py."""

from __future__ import annotations

from typing import Any, cast

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from engine.distributed.groups import Group
from engine.layers.parallel import share_heads


def group(rank: int, size: int) -> Group:
    return Group(rank, size, tuple(range(size)), cast(Any, None))


def test_two_ranks_split_query_and_key_heads():
    first, second = (share_heads(8, 2, group(rank, 2)) for rank in range(2))
    assert (first.first_head, first.num_heads) == (0, 4)
    assert (second.first_head, second.num_heads) == (4, 4)
    assert (first.first_kv_head, second.first_kv_head) == (0, 1)
    assert first.num_kv_heads == second.num_kv_heads == first.kv_replicas == 1


def test_key_heads_are_replicated_when_there_are_fewer_than_ranks():
    shares = [share_heads(8, 2, group(rank, 4)) for rank in range(4)]
    assert [share.first_kv_head for share in shares] == [0, 0, 1, 1]
    assert {share.kv_replicas for share in shares} == {2}


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_every_query_head_finds_its_own_key_head_on_its_rank(kv_heads, ratio, size):
    heads = kv_heads * ratio
    assume(heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0))
    seen = []
    for rank in range(size):
        share = share_heads(heads, kv_heads, group(rank, size))
        for local in range(share.num_heads):
            head = share.first_head + local
            # A query head reads the local key head that its position in the share maps to.
            local_kv = local // (share.num_heads // share.num_kv_heads)
            assert share.first_kv_head + local_kv == head // ratio
            seen.append(head)
    assert seen == list(range(heads))


def test_heads_that_do_not_divide_are_refused_with_the_setting_to_change():
    with pytest.raises(ValueError, match=r"parallel\.tensor = 3 must divide .* 8 attention heads"):
        share_heads(8, 4, group(0, 3))
    with pytest.raises(ValueError, match=r"parallel\.tensor = 2 must divide .* 3 key/value heads"):
        share_heads(6, 3, group(0, 2))
    with pytest.raises(ValueError, match=r"num_key_value_heads = 3 must divide"):
        share_heads(8, 3, group(0, 1))
