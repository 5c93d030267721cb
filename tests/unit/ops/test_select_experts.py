"""The choice of experts: the compiled form against its reference, order of equals, NaN.

Run: pytest tests/unit/ops/test_select_experts.py
"""

import pytest
import torch

from engine.ops.select_experts import (
    SCORES,
    SelectionRule,
    score_logits,
    select_experts,
    select_experts_reference,
    weigh_scores,
)
from tests.helpers.ops_cases import (
    ISAS_HERE,
    TIED_SCORES,
    each_isa,
    needs_native,
    on_isa,
)

NAN, INF = float("nan"), float("inf")


@each_isa
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(0, 4, 2), (1, 1, 1), (7, 5, 5), (3, 8, 2), (33, 60, 4), (5, 128, 8), (700, 64, 6)],
)
def test_it_equals_its_reference(isa, score, normalize, tokens, experts, top_k):
    torch.manual_seed(0)
    logits = torch.randn(experts, tokens).t() * 3  # a strided view
    bias = None if score == "softmax" and normalize else torch.rand(experts)
    rule = SelectionRule(top_k, score, normalize, normalize_eps=1e-3, scale=2.5)
    with on_isa(isa):
        scores, ids, weights = select_experts(logits, bias, rule)
    expected = select_experts_reference(logits, bias, rule)
    assert torch.equal(ids, expected[1]) and ids.dtype == torch.int64
    torch.testing.assert_close(scores, expected[0], rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(weights, expected[2], rtol=4e-6, atol=1e-30)


@each_isa
def test_a_normaliser_below_its_minimum_is_raised_to_it(isa):
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 0.0], [NAN, 0.0, 0.0]])
    bias = torch.tensor([0.0, 1.0, 1.0])  # chooses the second and the third
    rule = SelectionRule(2, normalize=True, normalize_min=0.5)
    with on_isa(isa):
        scores, ids, weights = select_experts(logits, bias, rule)
    assert ids[:2].tolist() == [[1, 2], [1, 2]]
    torch.testing.assert_close(weights[0], 2 * scores[0, 1:])
    assert weights[1].tolist() == [0.5, 0.5] and weights[2].isnan().all()


def test_square_roots_of_softplus_are_those_of_torch_far_from_zero_too():
    logits = torch.tensor([[-80.0, -20.0, -1e-3, 0.0, 5.0, 19.9, 20.1, 90.0]])
    scores = select_experts(logits, None, SelectionRule(2, "sqrt_softplus"))[0]
    expected = torch.nn.functional.softplus(logits.double()).sqrt()
    torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=0.0)


def test_the_bias_changes_the_choice_and_never_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 5.0])
    scores, ids, weights = select_experts(logits, bias, SelectionRule(2))
    assert ids.tolist() == [[2, 0]]
    assert torch.equal(weights, scores[:, [2, 0]])


@needs_native
def test_of_equal_scores_the_lower_expert_comes_first():
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 2.0]])
    assert select_experts(logits, None, SelectionRule(top_k=3))[1].tolist() == [
        [0, 1, 2],
        [1, 3, 0],
    ]


@each_isa
@pytest.mark.parametrize(("score", "logits", "top_k", "expected"), TIED_SCORES)
def test_where_scores_tie_the_largest_logits_are_chosen(isa, score, logits, top_k, expected):
    rule = SelectionRule(top_k, score, normalize=True, normalize_eps=1e-3, scale=2.5)
    logits = torch.tensor([logits])
    with on_isa(isa):
        scores, ids, weights = select_experts(logits, None, rule)
    assert ids.tolist() == [expected]
    assert torch.equal(weights, weigh_scores(scores[:, expected], scores[:, expected], rule))


@pytest.mark.parametrize(("score", "logits", "top_k", "expected"), TIED_SCORES)
def test_where_scores_tie_the_reference_chooses_the_largest_logits(score, logits, top_k, expected):
    rule, logits = SelectionRule(top_k, score, scale=2.5), torch.tensor([logits])
    scores, ids, weights = select_experts_reference(logits, None, rule)
    finite = [expert for expert in expected if logits[0, expert] > -INF]
    assert ids[0, : len(finite)].tolist() == finite  # torch promises no order of equal logits
    assert sorted(ids[0].tolist()) == sorted(expected)
    assert torch.equal(weights, scores.gather(1, ids) * 2.5)


@needs_native
def test_with_a_bias_or_groups_equal_scores_are_equal_whatever_the_logits():
    logits = torch.tensor([[20.0, 30.0, 25.0, 40.0]])  # sigmoid is 1 for all
    rule = SelectionRule(2, "sigmoid")
    assert select_experts(logits, torch.zeros(4), rule)[1].tolist() == [[0, 1]]
    bias = torch.tensor([0.0, 0.0, 0.5, 0.0])
    assert select_experts(logits, bias, rule)[1].tolist() == [[2, 0]]
    scores = select_experts(logits, None, SelectionRule(2, "sigmoid", num_groups=2))[0]
    assert scores.tolist() == [[1.0] * 4]


@needs_native
def test_ids_are_different_experts_that_exist_whatever_the_logits():
    logits = torch.tensor([[NAN] * 4, [-INF] * 4, [0.0, NAN, 3.0, 1.0], [INF, 0.0, INF, 0.0]])
    for score in ("softmax", "sigmoid"):
        ids = select_experts(logits, None, SelectionRule(top_k=3, score=score))[1]
        assert all(len(set(row)) == 3 for row in ids.tolist())
        assert ids.min() >= 0 and ids.max() < 4
    assert select_experts(logits[2:3], None, SelectionRule(top_k=2, score="sigmoid"))[
        1
    ].tolist() == [[1, 2]]


def test_a_logit_of_minus_infinity_has_the_score_zero():
    scores = select_experts(torch.tensor([[0.0, -INF, 0.0]]), None, SelectionRule(top_k=1))[0]
    assert scores.tolist() == [[0.5, 0.0, 0.5]]


@needs_native
@pytest.mark.parametrize("score", SCORES)
def test_scores_alone_are_those_of_the_choice_bit_for_bit(score):
    logits = torch.randn(33, 60, generator=torch.Generator().manual_seed(0))
    rule = SelectionRule(4, score, normalize=True, scale=2.5)
    assert torch.equal(score_logits(logits, score), select_experts(logits, None, rule)[0])


def test_every_instruction_set_gives_the_same_bits():
    torch.manual_seed(1)
    logits = torch.randn(50, 60) * 4
    if "avx2" not in ISAS_HERE or "avx512" not in ISAS_HERE:
        pytest.skip("the processor lacks AVX2 or AVX-512")
    results = []
    for isa in ("avx2", "avx512"):
        with on_isa(isa):
            results.append(select_experts(logits, None, SelectionRule(top_k=4, normalize=True)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_native
def test_a_token_gets_the_same_bits_alone_and_in_any_batch():
    torch.manual_seed(2)
    logits = torch.randn(300, 24)
    whole = select_experts(logits, None, SelectionRule(top_k=3, normalize=True))
    alone = [
        select_experts(row[None], None, SelectionRule(top_k=3, normalize=True)) for row in logits
    ]
    for column, values in enumerate(whole):
        assert torch.equal(values, torch.cat([each[column] for each in alone]))
