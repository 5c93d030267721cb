"""The router: hand-worked choices and weights of each family's rule. Run: pytest
tests/unit/moe/test_router.py
"""

import pytest
import torch

from engine.moe.router import RouterSpec, gate_logits, route, score_weights

LOGITS = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 3.5, -2.0, 0.5]])


def test_softmax_router_keeps_raw_scores_unless_set_to_normalize():
    spec = RouterSpec(num_experts=4, top_k=2)
    routing = route(LOGITS, spec)
    assert routing.topk_ids_TK.tolist() == [[1, 2], [1, 0]]
    torch.testing.assert_close(routing.scores_TE, LOGITS.softmax(-1))
    raw = routing.scores_TE.gather(1, routing.topk_ids_TK)
    assert torch.equal(routing.topk_weights_TK, raw)
    assert (routing.topk_weights_TK.sum(-1) < 1).all()


def test_normalized_weights_sum_to_scale():
    spec = RouterSpec(num_experts=4, top_k=3, normalize=True, scale=2.5)
    weights = route(LOGITS, spec).topk_weights_TK
    torch.testing.assert_close(weights.sum(-1), torch.tensor([2.5, 2.5]))


def test_correction_bias_changes_the_choice_and_never_the_weight():
    spec = RouterSpec(num_experts=4, top_k=1, score="sigmoid", correction_bias=True)
    routing = route(LOGITS, spec, torch.tensor([0.0, 0.0, 0.0, 10.0]))
    assert routing.topk_ids_TK.tolist() == [[3], [3]]
    assert torch.equal(routing.topk_weights_TK, routing.scores_TE[:, 3:])
    torch.testing.assert_close(routing.scores_TE, LOGITS.sigmoid())


@pytest.mark.parametrize(
    ("group_score", "expected"),
    # Groups (0,1) and (2,3). By best expert group 1 wins (0.9); by the sum of two group 0 does (1.3
    # against 1.0).
    [("max", [2, 3]), ("top2", [0, 1])],
)
def test_group_limited_choice_stays_inside_the_best_group(group_score, expected):
    scores = torch.tensor([[0.7, 0.6, 0.9, 0.1]])
    spec = RouterSpec(
        num_experts=4, top_k=2, score="sigmoid", num_groups=2, group_score=group_score
    )
    assert route(scores.logit(), spec).topk_ids_TK.tolist() == [expected]


def test_no_tokens_route_to_nothing():
    routing = route(torch.empty(0, 4), RouterSpec(num_experts=4, top_k=2, num_groups=2))
    assert routing.topk_ids_TK.shape == (0, 2)
    assert routing.scores_TE.shape == (0, 4)


def test_scores_are_float32_for_a_bfloat16_model():
    x, gate = torch.randn(3, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    for float32_logits in (False, True):
        spec = RouterSpec(num_experts=4, top_k=2, float32_logits=float32_logits)
        logits = gate_logits(x, gate, spec)
        assert (logits.dtype == torch.float32) == spec.float32_logits
        assert route(logits, spec).scores_TE.dtype == torch.float32


def test_top_k_equal_to_all_experts_uses_every_score():
    spec = RouterSpec(num_experts=4, top_k=4)
    routing = route(LOGITS, spec)
    torch.testing.assert_close(routing.topk_weights_TK.sum(-1), torch.ones(2))


def test_normalize_eps_is_added_to_the_sum():
    spec = RouterSpec(num_experts=2, top_k=2, normalize=True, normalize_eps=1.0)
    scores = torch.tensor([[0.5, 0.5]])
    weights = score_weights(scores, scores, spec)
    assert weights.tolist() == [[0.25, 0.25]]


def test_a_logit_bias_is_added_in_the_dtype_of_the_logits():
    x, gate, bias = torch.ones(1, 1).bfloat16(), torch.ones(2, 1).bfloat16(), torch.tensor([0.0, 3])
    for float32_logits in (False, True):
        spec = RouterSpec(num_experts=2, top_k=1, logit_bias=True, float32_logits=float32_logits)
        logits = gate_logits(x, gate, spec, bias.bfloat16())
        assert logits.tolist() == [[1.0, 4.0]]
        assert (logits.dtype == torch.float32) == float32_logits


def test_a_logit_cap_bounds_the_logits_and_leaves_the_choice():
    spec = RouterSpec(num_experts=4, top_k=2, normalize=True, logit_cap=1.5)
    logits = gate_logits(LOGITS, torch.eye(4), spec)
    torch.testing.assert_close(logits, 1.5 * (LOGITS / 1.5).tanh())
    routing = route(logits, spec)
    assert routing.topk_ids_TK.tolist() == [[1, 2], [1, 0]]
    chosen = (1.5 * (LOGITS / 1.5).tanh()).gather(1, routing.topk_ids_TK)
    torch.testing.assert_close(routing.topk_weights_TK, chosen.softmax(1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 5}, "num_experts_per_tok: 5"),
        ({"top_k": 1, "logit_cap": 0.0}, "router_logit_softcapping: 0.0"),
        ({"top_k": 1, "logit_cap": float("inf")}, "router_logit_softcapping: inf"),
        ({"top_k": 0}, "num_experts_per_tok: 0"),
        ({"top_k": 1, "num_groups": 3}, "n_group: 3"),
        ({"top_k": 1, "num_groups": 2, "top_groups": 3}, "topk_group: 3"),
        ({"top_k": 3, "num_groups": 2, "top_groups": 1}, "exceeds the 2 experts"),
        ({"top_k": 1, "token_table": 9, "correction_bias": True}, "has no correction bias"),
        ({"top_k": 1, "token_table": 9, "num_groups": 2, "top_groups": 2}, "n_group: 2"),
        ({"top_k": 1, "token_table": 9, "num_zero_experts": 3}, "zero_expert_num: 3"),
    ],
)
def test_impossible_router_is_refused_by_name_and_value(fields, message):
    with pytest.raises(ValueError, match=message):
        RouterSpec(num_experts=4, **fields)
