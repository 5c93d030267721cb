"""`RouterSpec` against the routers of transformers: experts and weights of the same logits.

Run: pytest tests/unit/moe/test_router_families.py
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.moe.router import RouterSpec, gate_logits, route

TOKENS, HIDDEN, EXPERTS, TOP_K = 40, 16, 12, 3
CONFIG = SimpleNamespace(
    hidden_size=HIDDEN,
    num_local_experts=EXPERTS,
    num_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    n_group=4,
    topk_group=2,
    moe_norm_min=0.4,
    scoring_func="sqrtsoftplus",
)


def drawn(router: Any) -> tuple[Any, torch.Tensor]:
    """The router with random weights, and tokens for it."""
    generator = torch.Generator().manual_seed(3)
    for tensor in router.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
    return router, torch.randn(TOKENS, HIDDEN, generator=generator)


def check(spec: RouterSpec, logits: torch.Tensor, bias: Any, weights: Any, ids: Any) -> None:
    """Same experts and weights, in whatever order; the choice is no trivial one."""
    routing = route(logits, spec, bias)
    mine = torch.zeros(TOKENS, EXPERTS).scatter(1, routing.topk_ids_TK, routing.topk_weights_TK)
    torch.testing.assert_close(mine, torch.zeros(TOKENS, EXPERTS).scatter(1, ids, weights))
    assert len(ids.unique()) > TOP_K
    if bias is not None:
        unbiased = route(logits, spec, torch.zeros(EXPERTS)).topk_ids_TK.sort(1).values
        assert not torch.equal(unbiased, ids.sort(1).values), "the bias changes the choice"


@torch.no_grad()
def test_sigmoid_with_bias_and_groups_is_glm_and_deepseek_v3() -> None:
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

    router, x = drawn(Glm4MoeTopkRouter(CONFIG))
    logits, weights, ids = router(x)
    spec = RouterSpec(
        num_experts=EXPERTS, top_k=TOP_K, score="sigmoid", normalize=True, normalize_eps=1e-20,
        scale=2.5, num_groups=4, top_groups=2, group_score="top2", correction_bias=True,
    )  # fmt: skip
    check(spec, logits, router.e_score_correction_bias, weights, ids)


@torch.no_grad()
def test_softmax_with_bias_and_a_minimum_of_the_normaliser_is_ernie() -> None:
    from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter

    router, x = drawn(Ernie4_5_MoeTopKRouter(CONFIG))
    logits, weights, ids = router(x)
    spec = RouterSpec(
        num_experts=EXPERTS, top_k=TOP_K, normalize=True, normalize_min=0.4, correction_bias=True
    )
    assert (weights.sum(1) < 0.99).any(), "the minimum is in use"
    check(spec, logits, router.moe_statics.e_score_correction_bias[0], weights, ids)


@torch.no_grad()
def test_square_roots_of_softplus_with_bias_are_deepseek_v4() -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

    router, x = drawn(DeepseekV4TopKRouter(CONFIG))
    logits, weights, ids = router(x)
    spec = RouterSpec(
        num_experts=EXPERTS, top_k=TOP_K, score="sqrt_softplus", normalize=True,
        normalize_eps=1e-20, scale=2.5, correction_bias=True,
    )  # fmt: skip
    check(spec, logits, router.e_score_correction_bias, weights, ids)


@pytest.mark.parametrize("scale", [1.0, 60.0])
@torch.no_grad()
def test_softmax_after_top_k_is_the_normalised_full_softmax_as_in_gpt_oss(scale: float) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    router, x = drawn(GptOssTopKRouter(CONFIG))
    logits, weights, ids = router(x * scale)
    spec = RouterSpec(num_experts=EXPERTS, top_k=TOP_K, normalize=True, logit_bias=True)
    mine = gate_logits(x * scale, router.weight, spec, router.bias)
    torch.testing.assert_close(mine, logits)
    check(spec, logits, None, weights, ids)


@torch.no_grad()
def test_sigmoid_of_capped_logits_with_a_bias_is_laguna() -> None:
    from transformers.models.laguna.modeling_laguna import LagunaTopKRouter

    config = SimpleNamespace(**vars(CONFIG), moe_router_logit_softcapping=0.9)
    router, x = drawn(LagunaTopKRouter(config))
    logits, weights, ids = router(x)
    spec = RouterSpec(
        num_experts=EXPERTS, top_k=TOP_K, score="sigmoid", normalize=True, correction_bias=True,
        logit_cap=0.9,
    )  # fmt: skip
    mine = gate_logits(x, router.weight, spec)
    torch.testing.assert_close(mine, logits)
    assert mine.abs().max() > 0.85, "the cap is in use"
    check(spec, mine, router.e_score_correction_bias, weights, ids)
