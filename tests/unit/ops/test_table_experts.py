"""Experts by a table of token ids: against the definition, and the bits of `select_experts`.

Run: pytest tests/unit/ops/test_table_experts.py
"""

from __future__ import annotations

import pytest
import torch

from engine.ops.select_experts import SelectionRule, select_experts
from engine.ops.table_experts import table_experts
from tests.helpers.layer_cases import table_of
from tests.helpers.ops_cases import each_isa, needs_native, on_isa


def definition(score: str, logits_E: torch.Tensor) -> torch.Tensor:
    if score == "softmax":
        return logits_E.exp() / logits_E.exp().sum()
    return 1 / (1 + (-logits_E).exp()) if score == "sigmoid" else (1 + logits_E.exp()).log().sqrt()


@each_isa
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("least", [None, 0.0, 9.0])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 4, 2), (7, 5, 5), (33, 60, 4)])
def test_choice_is_the_tables_and_weights_are_those_of_its_scores(
    isa, score, least, tokens, experts, top_k
):
    torch.manual_seed(0)
    logits = torch.randn(experts, tokens).t() * 3  # a strided view
    table, ids = table_of(11, experts, top_k), torch.randint(11, (tokens,))
    rule = SelectionRule(
        top_k, score, least is not None, 1e-3, scale=1.5, normalize_min=least or 0.0
    )
    with on_isa(isa):
        scores, chosen, weights = table_experts(logits, table, ids, rule)
    assert (scores.dtype, chosen.dtype, weights.dtype) == (
        torch.float32,
        torch.int64,
        torch.float32,
    )
    assert chosen.tolist() == [table.tolist()[each] for each in ids.tolist()]
    for t in range(tokens):
        of_t = definition(score, logits[t].double())
        torch.testing.assert_close(scores[t].double(), of_t, rtol=1e-5, atol=1e-12)
        own = of_t[chosen[t]]
        if least is not None:
            own = own / max(float(own.sum()) + 1e-3, least)
        torch.testing.assert_close(weights[t].double(), own * 1.5, rtol=1e-5, atol=1e-12)


@each_isa
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_a_table_that_holds_the_best_experts_is_the_choice_by_scores(isa, score):
    torch.manual_seed(1)
    logits = torch.randn(40, 16)
    rule = SelectionRule(4, score, normalize=True, normalize_eps=1e-20, scale=2.5)
    with on_isa(isa):
        by_scores = select_experts(logits, None, rule)
        by_table = table_experts(logits, by_scores[1], torch.arange(40), rule)
    assert torch.equal(by_table[0], by_scores[0]) and torch.equal(by_table[1], by_scores[1])
    torch.testing.assert_close(by_table[2], by_scores[2], rtol=4e-7, atol=0)


@needs_native
def test_a_token_gets_the_same_bits_alone_and_in_any_batch():
    torch.manual_seed(2)
    logits, table, ids = torch.randn(300, 24), table_of(50, 24, 6), torch.randint(50, (300,))
    rule = SelectionRule(6, "sqrt_softplus", normalize=True, normalize_eps=1e-20, scale=1.5)
    whole = table_experts(logits, table, ids, rule)
    for part in (1, 7):
        parts = [
            table_experts(rows, table, of, rule)
            for rows, of in zip(logits.split(part), ids.split(part), strict=True)
        ]
        for column, values in enumerate(whole):
            assert torch.equal(values, torch.cat([each[column] for each in parts]))
