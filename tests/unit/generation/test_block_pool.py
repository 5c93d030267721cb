"""The block pool: no block lost, none owned twice.

Run: pytest tests/unit/generation/test_block_pool.py
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.generation.block_pool import BlockPool


def test_blocks_come_in_order_and_the_last_freed_are_reused_first():
    pool = BlockPool(5, 4)
    first, second = pool.allocate(2), pool.allocate(2)
    assert (first, second, pool.num_free) == ([0, 1], [2, 3], 1)
    pool.free(first)
    assert pool.allocate(3) == [0, 1, 4]
    assert pool.num_free == 0
    assert pool.allocate(0) == []


def test_blocks_for_rounds_up():
    pool = BlockPool(5, 4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_more_blocks_than_are_free_and_a_second_free_are_caught():
    pool = BlockPool(3, 4)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="2 blocks asked of 1"):
        pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free([blocks[0]])


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (4, 0)])
def test_a_cache_of_nothing_is_refused_with_the_setting_to_raise(num_blocks, block_size):
    with pytest.raises(ValueError, match="raise scheduler.kv_cache_gib"):
        BlockPool(num_blocks, block_size)


@given(st.lists(st.integers(0, 6), max_size=60), st.randoms())
def test_blocks_are_owned_once_and_none_is_lost(sizes, random):
    pool = BlockPool(16, 2)
    held: list[list[int]] = []
    for size in sizes:
        if size <= pool.num_free:
            held.append(pool.allocate(size))
        elif held:
            pool.free(held.pop(random.randrange(len(held))))
        owned = [block for blocks in held for block in blocks]
        assert len(set(owned)) == len(owned) == 16 - pool.num_free
        assert all(0 <= block < 16 for block in owned)
    for blocks in held:
        pool.free(blocks)
    assert sorted(pool.allocate(16)) == list(range(16))
