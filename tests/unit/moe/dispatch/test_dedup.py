"""Unique rows by hand and against sets; bitmaps.

Run: pytest tests/unit/moe/dispatch/test_dedup.py
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.moe.dispatch.dedup import Deduplicator, expected_unique
from engine.ops.unique_rows import read_bits, rows_by_expert


def test_the_worked_example_of_the_module_holds():
    groups = Deduplicator([3, 2])
    found = groups.unique(torch.tensor([[0, 2], [4, 1], [-1, 4]]))
    assert found.load_G.tolist() == [2, 2]
    assert found.token_U[:4].tolist() == [0, 1, 1, 2]
    assert found.slot_TM.tolist() == [[0, -1], [2, 1], [-1, 3]]
    assert found.bits_TGB[..., 0].tolist() == [[0b101, 0], [0b010, 0b10], [0, 0b10]]
    weights = groups.weights(found, torch.tensor([[0.5, 0.25], [1.0, 2.0], [9.0, 4.0]]))
    assert weights.tolist() == [
        [[0.5, 0.0, 0.25], [0.0, 0.0, 0.0]],
        [[0.0, 2.0, 0.0], [0.0, 1.0, 0.0]],
        [[0.0, 0.0, 0.0], [0.0, 4.0, 0.0]],
    ]
    bits = torch.tensor([[0b101], [0b010]], dtype=torch.uint8)
    index, slot = rows_by_expert(bits, 3, 3, with_slots=True)
    assert index.tolist() == [0, 1, 0]
    assert slot is not None and slot.tolist() == [[0, -1, 2], [-1, 1, -1]]


def test_bitmaps_of_more_than_eight_experts_take_more_bytes():
    groups = Deduplicator([10])
    assert groups.num_bytes == 2
    found = groups.unique(torch.tensor([[9, 0, 8]]))
    assert found.bits_TGB.tolist() == [[[0b1, 0b11]]]
    flags = read_bits(found.bits_TGB[0], 10)
    assert flags[:, 0].nonzero().flatten().tolist() == [0, 8, 9]


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 4),
    tokens=st.integers(0, 7),
    columns=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_unique_rows_are_the_distinct_pairs_of_token_and_group(sizes, tokens, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(tokens, sum(sizes), generator=generator).argsort(1)[:, :columns]
    places = places.masked_fill(torch.rand(places.shape, generator=generator) < 0.3, -1)
    group_of = [group for group, size in enumerate(sizes) for _ in range(size)]
    groups = Deduplicator(sizes)
    found = groups.unique(places)
    pairs = {
        (group_of[place], token)
        for token, row in enumerate(places.tolist())
        for place in row
        if place >= 0
    }
    assert found.token_U[: len(pairs)].tolist() == [token for _, token in sorted(pairs)]
    assert found.load_G.tolist() == [
        sum(g == group for g, _ in pairs) for group in range(len(sizes))
    ]
    assert torch.equal(groups.count(places[None])[0], found.load_G)
    for token, row in enumerate(places.tolist()):
        mine = [int(slot) for slot in found.slot_TM[token] if slot >= 0]
        assert [sorted(pairs)[slot][1] for slot in mine] == [token] * len(mine)
        assert len(mine) == len({group_of[place] for place in row if place >= 0})


def test_an_index_stays_inside_the_rows_when_bitmaps_and_counts_disagree():
    served = torch.tensor([[0b1], [0b1], [0b1]], dtype=torch.uint8)
    index, _ = rows_by_expert(served, 1, 2, with_slots=False)
    assert index.tolist() == [0, 1]
    index, _ = rows_by_expert(torch.zeros_like(served), 1, 2, with_slots=False)
    assert index.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("sizes", "top_k", "expected"),
    [([8] * 8, 8, 5.43), ([32] * 2, 8, 2.0), ([1] * 8, 2, 2.0), ([4, 4], 1, 1.0), ([8], 3, 1.0)],
)
def test_expected_ranks_of_a_token(sizes, top_k, expected):
    assert expected_unique(sizes, top_k) == pytest.approx(expected, abs=0.01)
