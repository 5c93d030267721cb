"""Zero experts in the router's description, its choice, and the records of it.

Run: pytest tests/unit/moe/test_zero_experts.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import CapacityConfig
from engine.config.validation import ConfigError
from engine.config.world_rules import validate_capacity
from engine.moe.router import RouterSpec, gate_logits, route
from engine.ops.zero_experts import add_zero_experts
from engine.profiling.routing.claim_log import LayerClaims, without_padding

SPEC = RouterSpec(num_experts=6, top_k=3, num_zero_experts=3, scale=6.0, correction_bias=True)
LOGITS = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
BIAS = torch.linspace(-0.1, 0.1, 9)


def test_the_choice_is_that_of_a_router_with_more_experts() -> None:
    routing = route(LOGITS, SPEC, BIAS)
    wide = route(LOGITS, replace(SPEC, num_experts=9, num_zero_experts=0), BIAS)
    is_zero = wide.topk_ids_TK >= 6
    assert is_zero.any() and not is_zero.all()
    assert torch.equal(routing.scores_TE, wide.scores_TE[:, :6])
    assert torch.equal(routing.topk_ids_TK, wide.topk_ids_TK.where(~is_zero, -1))
    assert torch.equal(routing.topk_weights_TK, wide.topk_weights_TK.where(~is_zero, 0.0))
    assert routing.zero_weight_T is not None and wide.zero_weight_T is None
    total = routing.zero_weight_T + routing.topk_weights_TK.sum(1)
    torch.testing.assert_close(total, wide.topk_weights_TK.sum(1))


@torch.no_grad()
def test_the_choice_is_that_of_longcat_flash() -> None:
    from transformers import LongcatFlashConfig
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter

    config = LongcatFlashConfig(hidden_size=16, moe_topk=3, n_routed_experts=6, zero_expert_num=3)
    router, generator = LongcatFlashTopkRouter(config), torch.Generator().manual_seed(3)
    router.classifier.weight.copy_(torch.randn(9, 16, generator=generator) * 0.5)
    router.e_score_correction_bias.copy_(torch.rand(9, generator=generator) * 0.2)
    x = torch.randn(40, 16, generator=generator)
    _, weights, ids = router(x)
    routing = route(
        gate_logits(x, router.classifier.weight, SPEC), SPEC, router.e_score_correction_bias
    )
    wanted = torch.zeros(40, 9).scatter(1, ids, weights)
    mine = torch.zeros(40, 7).scatter_add(
        1, routing.topk_ids_TK.where(routing.topk_ids_TK >= 0, 6), routing.topk_weights_TK
    )
    torch.testing.assert_close(mine[:, :6], wanted[:, :6])
    torch.testing.assert_close(routing.zero_weight_T, wanted[:, 6:].sum(1))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_groups": 2}, "zero_expert_num: 3 is not supported with n_group"),
        ({"weights_on_input": True, "top_k": 1}, "with weights on the experts' input"),
        ({"expert_scale": True}, "with a scale per expert"),
        ({"num_zero_experts": -1}, "zero_expert_num: -1 must not be negative"),
    ],
)
def test_what_is_not_defined_is_refused_in_words(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(SPEC, **fields)


def test_extras_are_possible_where_a_token_may_choose_all_experts_or_not() -> None:
    config = CapacityConfig(policy="expanded_drop")
    settings: dict[str, Any] = {"num_experts": 4, "top_k": 4, "expert_ranks": 2}
    with pytest.raises(ConfigError, match="already chooses all 4 experts"):
        validate_capacity(config, **settings)
    validate_capacity(config, **settings, num_zero_experts=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_added_by_its_weight_and_rounded_once(dtype: torch.dtype) -> None:
    out, x = torch.randn(2, 5, 16).to(dtype)
    weight = torch.rand(5) * 6
    got = add_zero_experts(out, x, weight)
    assert got.dtype == dtype
    wanted = (out.double() + weight.double()[:, None] * x.double()).to(dtype)
    torch.testing.assert_close(got, wanted)


def test_columns_without_a_claim_are_left_out_of_a_record_wherever_they_are() -> None:
    ids = np.array([[2, -1, 1], [0, -1, -1]], dtype=np.int32)
    scores = np.array([[0.5, 0.0, 0.2], [0.4, 0.0, 0.0]], dtype=np.float32)
    numbers = np.arange(2, dtype=np.int32)
    claims = LayerClaims(
        request_T=numbers,
        position_T=numbers,
        eligible_T=numbers >= 0,
        topk_ids_TK=ids,
        scores_TK=scores,
    )
    kept = without_padding(claims)
    assert kept.topk_ids_TK.tolist() == [[2, 1], [0, -1]]
    assert kept.scores_TK.tolist() == scores[:, [0, 2]].tolist()
