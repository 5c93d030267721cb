"""The native sort against its reference. Run: pytest tests/unit/ops/test_sort_by_expert.py"""

import pytest
import torch

from engine.ops.sort_by_expert import sort_by_expert, sort_by_expert_reference


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(0, 2, 4), (1, 1, 1), (7, 3, 5), (300, 8, 64)]
)
def test_sort_equals_its_reference_bit_for_bit(tokens, top_k, experts):
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k]  # a strided view
    for result, expected in zip(
        sort_by_expert(ids, experts), sort_by_expert_reference(ids, experts), strict=True
    ):
        assert torch.equal(result, expected)


def test_equal_experts_keep_token_order():
    token, slot, load = sort_by_expert(torch.tensor([[1], [0], [1], [0]]), 3)
    assert token.tolist() == [1, 3, 0, 2]
    assert slot.flatten().tolist() == [2, 0, 3, 1]
    assert load.tolist() == [2, 2, 0]


@pytest.mark.parametrize("sort", [sort_by_expert, sort_by_expert_reference])
def test_an_id_of_minus_one_is_no_assignment(sort):
    token, slot, load = sort(torch.tensor([[1, -1], [-1, -1], [0, 1]]), 3)
    assert load.tolist() == [1, 2, 0]
    assert token[:3].tolist() == [2, 0, 2] and token.numel() == 6
    assert slot.tolist() == [[1, -1], [-1, -1], [0, 2]]
