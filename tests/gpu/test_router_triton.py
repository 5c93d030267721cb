"""The Triton kernel of the router with groups of experts, logits of any dtype and scores that tie,
against torch.

TRITON_INTERPRET=1 python -m pytest tests/gpu/test_router_triton.py
"""

import pytest
import torch

from engine.ops.select_experts import SelectionRule, select_experts_reference
from engine.ops.table_experts import table_experts_reference
from tests.gpu.test_ops_triton import DEVICE, kernel
from tests.helpers.layer_cases import table_of
from tests.helpers.ops_cases import TIED_SCORES

# Experts, groups, groups that may be chosen from, top-k: DeepSeek's ratios, odd ones, single ones.
GROUPS = [(32, 8, 4, 6), (20, 5, 2, 3), (6, 3, 1, 2), (4, 4, 3, 3), (8, 1, 1, 2)]


@kernel
@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("experts", "groups", "top_groups", "top_k"), GROUPS)
def test_groups_match_the_reference(experts, groups, top_groups, top_k, dtype, group_score):
    from engine.ops.gpu.select_experts import select_experts_triton

    generator = torch.Generator().manual_seed(experts)
    # No two scores of a token alike, in any dtype: torch promises no order of equals.
    logits = (torch.rand(3, experts, generator=generator).argsort(1) / 8 - 2).to(dtype)
    score = "sigmoid" if group_score == "top2" else "softmax"
    bias = torch.rand(experts, generator=generator) if score == "sigmoid" else None
    more = (True, 1e-3, 2.5, groups, top_groups, group_score)
    rule = SelectionRule(top_k, score, *more)
    on_device = None if bias is None else bias.to(DEVICE)
    got = select_experts_triton(logits.to(DEVICE), on_device, rule)
    expected = select_experts_reference(logits, bias, rule)
    assert torch.equal(got[1].cpu(), expected[1])
    for mine, theirs in ((got[0], expected[0]), (got[2], expected[2])):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-6)


@kernel
@pytest.mark.parametrize(("score", "logits", "top_k", "expected"), TIED_SCORES)
def test_where_scores_tie_the_largest_logits_are_chosen(score, logits, top_k, expected):
    from engine.ops.gpu.select_experts import select_experts_triton

    logits = torch.tensor([logits], device=DEVICE)
    scores, ids, weights = select_experts_triton(logits, None, SelectionRule(top_k, score))
    assert ids.tolist() == [expected]
    assert torch.equal(weights, scores[:, expected])


@kernel
def test_with_a_bias_equal_scores_are_equal_whatever_the_logits():
    from engine.ops.gpu.select_experts import select_experts_triton

    logits = torch.tensor([[20.0, 30.0, 25.0, 40.0]], device=DEVICE)  # sigmoid is 1 for all
    for bias, expected in ([0.0, 0.0, 0.0, 0.0], [0, 1]), ([0.0, 0.0, 0.5, 0.0], [2, 0]):
        bias = torch.tensor(bias, device=DEVICE)
        _, ids, _ = select_experts_triton(logits, bias, SelectionRule(2, "sigmoid"))
        assert ids.tolist() == [expected]


@kernel
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(0, 4, 2), (3, 8, 2), (5, 60, 6), (1, 1, 1), (2, 6, 6)]
)
def test_experts_of_a_table_match_the_reference(tokens, experts, top_k, dtype, score):
    from engine.ops.gpu.table_experts import table_experts_triton

    logits = torch.randn(tokens, experts + 3)[:, :experts].to(dtype)
    table, ids = table_of(7, experts, top_k), torch.randint(7, (tokens,))
    for least in (0.0, 9.0):
        rule = SelectionRule(top_k, score, True, 1e-20, 1.5, normalize_min=least)
        given = (logits.to(DEVICE), table.to(DEVICE), ids.to(DEVICE))
        got = table_experts_triton(*given, rule)
        expected = table_experts_reference(logits, table, ids, rule)
        assert torch.equal(got[1].cpu(), expected[1])
        for mine, theirs in ((got[0], expected[0]), (got[2], expected[2])):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-6)


@kernel
def test_with_groups_too_the_ids_differ_and_exist_whatever_the_logits():
    from engine.ops.gpu.select_experts import select_experts_triton

    nan = float("nan")
    logits = torch.tensor([[nan] * 8, [1.0] * 8, [0, nan, 3, 3, -1e30, 9, 9, 9], [-1e30] * 8])
    for group_score in ("max", "top2"):
        rule = SelectionRule(3, "sigmoid", num_groups=4, top_groups=2, group_score=group_score)
        _, ids, _ = select_experts_triton(logits.to(DEVICE), None, rule)
        assert all(len(set(row)) == 3 for row in ids.tolist())
        assert ids.min() >= 0 and ids.max() < 8
