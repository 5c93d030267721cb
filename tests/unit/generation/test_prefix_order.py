"""Prefix order and dealing: neighbours share the longest beginnings, and no rank has too much.

Run: pytest tests/unit/generation/test_prefix_order.py
"""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.generation.prefix_order import (
    PrefixHashes,
    SharedPrefixes,
    deal_requests,
    find_shared,
)
from engine.generation.request_source import partition
from engine.request import Request, SamplingParams

LENGTHS = (2, 4, 8)


def hashes_of(prompts: list[str]) -> PrefixHashes:
    levels = [
        np.array([hash(text[begin:end]) for text in prompts if len(text) >= end], dtype=np.int64)
        for begin, end in pairwise((0, *LENGTHS))
    ]
    return PrefixHashes(LENGTHS, np.array([len(text) for text in prompts]), levels)


def shared(prompts: list[str]) -> SharedPrefixes:
    found = find_shared(hashes_of(prompts))
    assert found is not None
    return found


def levels_in_common(one: str, other: str) -> int:
    return sum(one[:end] == other[:end] and len(one) >= end <= len(other) for end in LENGTHS)


def test_groups_are_neighbours_in_the_order_of_their_first_prompt_by_hand():
    prompts = ["aa1", "bbcc1", "x", "aa2", "bbdd1", "bbcc2", "y"]
    found = shared(prompts)
    assert found.order_n.tolist() == [0, 3, 1, 5, 4, 2, 6]
    assert found.common_n.tolist() == [0, 1, 0, 2, 1, 0, 0]
    assert (found.num_sharing, found.num_prefixes) == (5, 3)
    # aa once, bb twice and bbcc's second half once had been computed: 8 of 23.
    assert found.saved == pytest.approx(8 / 23)


def test_prompts_that_share_nothing_have_no_order_of_their_own():
    assert find_shared(hashes_of(["ab1", "cd2", "ef3", "a", ""])) is None
    assert find_shared(hashes_of([])) is None


def test_a_beginning_too_short_to_matter_does_not_change_the_order():
    long = [name + "x" * 97 for name in ("abc", "def", "abz")]
    assert find_shared(hashes_of(long)) is None
    assert find_shared(hashes_of([text[:12] for text in long])) is not None


PROMPTS = st.lists(st.text("ab", max_size=10), max_size=40)


@given(PROMPTS)
def test_the_order_is_a_permutation_in_which_what_shares_a_level_is_together(prompts):
    found = find_shared(hashes_of(prompts))
    if found is None:
        return
    order = found.order_n.tolist()
    assert sorted(order) == list(range(len(prompts)))
    for end in LENGTHS:
        begun = [prompts[index][:end] for index in order if len(prompts[index]) >= end]
        runs = [text for text, before in zip(begun, [None, *begun], strict=False) if text != before]
        assert len(runs) == len(set(runs)), "a group is one run"
    pairs = zip(order[1:], order[:-1], strict=True)
    common = [levels_in_common(prompts[one], prompts[other]) for one, other in pairs]
    assert found.common_n.tolist()[1:] == common
    firsts = [index for index, level in zip(order, found.common_n, strict=True) if level == 0]
    assert firsts == sorted(firsts)


@given(PROMPTS, st.data())
def test_hashes_of_some_prompts_are_those_taken_of_them_alone(prompts, data):
    rows = sorted(data.draw(st.sets(st.sampled_from(range(len(prompts) or 1)))))
    rows = [row for row in rows if row < len(prompts)]
    some = hashes_of(prompts).select(np.array(rows, dtype=np.int64))
    alone = hashes_of([prompts[row] for row in rows])
    assert some.sizes_n.tolist() == alone.sizes_n.tolist()
    assert [level.tolist() for level in some.hashes] == [level.tolist() for level in alone.hashes]


def shares_of(found: SharedPrefixes, loads: list[int], num_ranks: int) -> list[list[int]]:
    dealt_n, bounds = found.deal(np.array(loads), num_ranks)
    return [dealt_n[begin:end].tolist() for begin, end in pairwise(bounds)]


@given(
    groups=st.lists(st.tuples(st.integers(1, 60), st.integers(8, 40)), min_size=1, max_size=30),
    num_ranks=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_no_rank_has_more_than_a_tenth_above_the_mean_but_for_one_prompt(groups, num_ranks, seed):
    prompts = [
        f"{number:08d}" + "x" * (size - 8)
        for number, (count, size) in enumerate(groups)
        for _ in range(count)
    ]
    random.Random(seed).shuffle(prompts)
    found = find_shared(hashes_of(prompts))
    if found is None:
        return
    loads = [len(text) for text in prompts]
    shares = shares_of(found, loads, num_ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(prompts)))
    most = max(sum(loads[index] for index in share) for share in shares)
    mean = sum(loads) / num_ranks
    assert most <= max(1.1 * mean, mean + max(loads))


def test_groups_stay_whole_where_balance_allows():
    prompts = ["aa", "bb", "bb", "cc", "aa", "bb", "bb", "cc"]
    shares = shares_of(shared(prompts), [1] * 8, 2)
    assert [{prompts[index] for index in share} for share in shares] == [{"bb"}, {"aa", "cc"}]
    many = [f"{name:02d}" for name in range(40) for _ in range(25)]
    random.Random(0).shuffle(many)
    held = [{many[index] for index in share} for share in shares_of(shared(many), [1] * 1000, 4)]
    assert [len(names) for names in held] == [10] * 4 and len(set.union(*held)) == 40


def test_a_group_larger_than_a_rank_is_cut_into_runs_where_least_is_shared():
    prompts = ["aabb1", "aabb2", "aacc1", "aabb3", "aacc2", "aacc3"]
    shares = shares_of(shared(prompts), [1] * 6, 2)
    assert shares == [[0, 1, 3], [2, 4, 5]]
    same = ["aabbccdd"] * 90
    shares = shares_of(shared(same), [8] * 90, 4)
    assert all(share == list(range(share[0], share[-1] + 1)) for share in shares)
    assert all(21 <= len(share) <= 24 for share in shares)


def test_prompts_of_their_own_fill_up_the_ranks_in_input_order():
    prompts = ["aa"] * 30 + [f"{name:02d}" for name in range(10, 40)]
    shares = shares_of(shared(prompts), [1] * 60, 2)
    assert shares == [list(range(30)), list(range(30, 60))]


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=6), num_ranks=st.integers(1, 9))
def test_prompts_without_a_load_are_dealt_too(counts, num_ranks):
    prompts = [f"{number:02d}" for number, count in enumerate(counts) for _ in range(count)]
    found = find_shared(hashes_of(prompts))
    if found is not None:
        dealt_n, bounds = found.deal(np.zeros(len(prompts), dtype=np.int64), num_ranks)
        assert sorted(dealt_n.tolist()) == list(range(len(prompts)))
        assert len(bounds) == num_ranks + 1 and bounds == sorted(bounds)


def request(index: int, ids: list[int]) -> Request:
    params = SamplingParams(max_new_tokens=1)
    return Request(index=index, id=str(index), prompt_token_ids=ids, params=params)


def test_requests_with_common_blocks_go_to_one_rank():
    requests = [request(index, [index % 2] * 20 + [index]) for index in range(12)]
    shares = deal_requests(requests, 2, block_size=16)
    assert [[each.index % 2 for each in share] for share in shares] == [[0] * 6, [1] * 6]


def test_requests_that_share_less_than_a_block_are_dealt_as_ever():
    requests = [request(index, [7] * 15 + [index] * (1 + index)) for index in range(12)]
    assert deal_requests(requests, 3, block_size=16) == partition(requests, 3)
    assert deal_requests([], 2, block_size=16) == [[], []]
