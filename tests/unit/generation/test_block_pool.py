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


# --- cached blocks ----------------------------------------------------------------------------


def test_a_published_block_is_found_shared_and_free_only_after_its_last_user() -> None:
    pool = BlockPool(8, 4)
    blocks = pool.allocate(3)
    pool.publish(blocks[0], b"a")
    pool.publish(blocks[1], b"b")
    assert pool.find([b"a", b"b", b"c"]) == blocks[:2]
    assert pool.find([b"x", b"b"]) == []  # a chain is found from its head only
    pool.share(blocks[:2])
    pool.free(blocks)
    assert (pool.num_free, pool.num_unused(blocks[:2])) == (6, 0)
    pool.free(blocks[:2])
    assert (pool.num_free, pool.num_unused(blocks[:2])) == (8, 2)
    pool.share(pool.find([b"a"]))
    assert pool.num_free == 7


def test_the_same_content_is_cached_once() -> None:
    pool = BlockPool(4, 4)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    assert pool.find([b"a"]) == [first]
    pool.free([second])
    assert pool.num_unused([first]) == 0
    assert pool.allocate(1) == [second]


def test_content_is_dropped_only_when_no_block_is_free_the_tail_of_the_oldest_chain_first() -> None:
    pool = BlockPool(12, 4)
    old, new = pool.allocate(2), pool.allocate(1)
    for block, content in zip(old + new, [b"a", b"b", b"c"], strict=True):
        pool.publish(block, content)
    pool.free(old)
    pool.free(new)
    held = pool.allocate(9)
    assert all(map(pool.is_cached, [b"a", b"b", b"c"]))
    dropped = []
    while pool.num_free:
        held += pool.allocate(1)
        dropped.append([name for name in (b"a", b"b", b"c") if pool.is_cached(name)])
    assert dropped == [[b"a", b"c"], [b"c"], []]
    assert sorted(held) == list(range(12))


def test_unused_content_takes_at_most_a_quarter_of_the_pool() -> None:
    pool = BlockPool(16, 4)
    blocks = pool.allocate(10)
    for block in blocks:
        pool.publish(block, b"%d" % block)
    pool.free(blocks)
    assert sum(pool.is_cached(b"%d" % block) for block in blocks) == 4
    assert pool.find([b"%d" % block for block in blocks]) == blocks[:4]
    assert pool.num_free == 16


def test_withdrawn_content_is_found_no_more_and_its_block_is_free_after_use() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], b"a")
    pool.withdraw(blocks)
    assert pool.find([b"a"]) == []
    pool.free(blocks)
    assert sorted(pool.allocate(2)) == blocks


def test_dropping_all_content_leaves_blocks_in_use_with_their_users() -> None:
    pool = BlockPool(8, 4)
    used, unused = pool.allocate(1), pool.allocate(1)
    pool.publish(used[0], b"a")
    pool.publish(unused[0], b"b")
    pool.free(unused)
    pool.drop_cached()
    assert not pool.is_cached(b"a") and not pool.is_cached(b"b")
    assert pool.num_free == 7
    pool.free(used)
    assert sorted(pool.allocate(8)) == list(range(8))
