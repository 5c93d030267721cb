"""The ops of unique rows by hand. Run: pytest tests/unit/ops/test_unique_rows.py

The worked example of `engine/moe/dispatch/dedup.py`: experts 0 1 2 are group 0, 3 4 group 1, and 3
tokens have the ids [[0, 2], [4, 1], [-1, 4]].
"""

import torch

from engine.ops.unique_rows import (
    cells_of_rows,
    count_groups,
    mark_groups,
    pack_headers,
    read_bits,
    rows_by_expert,
    spread_weights,
)

# By expert, then of none: the group, the byte, the bit, the place of the weight among 2 * 3.
TABLE = torch.tensor(
    [[0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 2], [1, 2, 4, 1, 2, 0], [0, 1, 2, 3, 4, 6]]
)
IDS = torch.tensor([[0, 2], [4, 1], [-1, 4]])


def test_only_a_tokens_first_column_in_a_group_has_its_group():
    first, bits, place = mark_groups(IDS, TABLE, 2, 1)
    assert first.tolist() == [[0, -1], [1, 0], [-1, 1]]
    assert bits[..., 0].tolist() == [[0b101, 0], [0b010, 0b10], [0, 0b10]]
    assert place.tolist() == [[0, 2], [4, 1], [6, 4]]


def test_each_rank_has_its_own_counts():
    nothing = torch.full_like(IDS, -1)
    assert count_groups(torch.stack((IDS, nothing)), TABLE, 2).tolist() == [[2, 2], [0, 0]]


def test_a_weight_without_a_place_is_left_out():
    weights = torch.tensor([[0.5, 0.25], [1.0, 2.0], [float("nan"), 4.0]])
    spread = spread_weights(TABLE[3][IDS], weights, 6)
    assert spread.tolist() == [[0.5, 0, 0.25, 0, 0, 0], [0, 2, 0, 0, 1, 0], [0, 0, 0, 0, 4, 0]]


def test_cells_count_groups_within_tokens():
    assert cells_of_rows(torch.tensor([0, 1, 1, 2]), torch.tensor([2, 2])).tolist() == [0, 2, 3, 5]


def test_a_row_has_the_bitmap_and_weights_of_its_cell():
    bits = torch.tensor([[1], [2], [3]], dtype=torch.uint8)
    weights = torch.tensor([[0.5], [1.0], [2.0]])
    rows = torch.full((2, 12), 9, dtype=torch.uint8)
    pack_headers(torch.tensor([2, 0]), bits, weights, rows, 8, 4)
    assert rows[:, 8].tolist() == [3, 1]
    assert rows[:, 4:8].view(torch.float32).tolist() == [[2.0], [0.5]]
    assert (rows[:, :4] == 9).all() and (rows[:, 9:] == 9).all()


def test_received_rows_are_ordered_by_expert_then_as_received():
    bits = torch.tensor([[0b101], [0b010], [0b111]], dtype=torch.uint8)
    assert read_bits(bits, 3).int().tolist() == [[1, 0, 1], [0, 1, 1], [1, 0, 1]]
    index, slot = rows_by_expert(bits, 3, 6, with_slots=True)
    assert index.tolist() == [0, 2, 1, 2, 0, 2]
    assert slot is not None and slot.tolist() == [[0, -1, 4], [-1, 2, -1], [1, 3, 5]]
    assert rows_by_expert(bits, 3, 6, with_slots=False)[1] is None
