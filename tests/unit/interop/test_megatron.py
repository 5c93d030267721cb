"""Megatron-Core's router under Lockstep's capacity, one process: by hand and against the slow
reference. Run: pytest tests/unit/interop/test_megatron.py
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from engine.config import CapacityConfig
from engine.interop.megatron import capacity_router
from engine.interop.megatron_settings import check_settings, router_scores
from engine.profiling.loads import LayerDrops
from tests.helpers import reference
from tests.helpers.megatron_case import (
    groups,
    logits_of,
    make_router,
    needs_megatron,
    no_cuda,
    random_logits,
)
from tests.helpers.megatron_case import transformer_config as config_of

pytestmark = needs_megatron

# K = 2, E = 4, T = 4, gamma = 1: C = 2. Expert 0 is chosen by t0, t1, t2 and expert 1 by t0, t2,
# t3; experts 2 and 3 by one token each.
SCORES = [
    [0.50, 0.30, 0.15, 0.05],
    [0.60, 0.10, 0.25, 0.05],
    [0.55, 0.25, 0.12, 0.08],
    [0.10, 0.45, 0.05, 0.40],
]
TOKEN_DROP = CapacityConfig(policy="token_drop", factor="1")
EXPANDED_DROP = CapacityConfig(policy="expanded_drop", factor="1")


def experts_of(mask_TE: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask_TE]


def both(config, capacity: CapacityConfig, logits: torch.Tensor, padding=None):
    """Results of Megatron's own router and of the one with capacity; and the latter router."""
    router = make_router(config, capacity)
    return (
        make_router(config, None).routing(logits, padding),
        router.routing(logits, padding),
        router,
    )


def test_an_expert_keeps_its_best_assignments_with_their_weights_bit_for_bit():
    (probs, _), (kept, mask), router = both(config_of(4, 2), TOKEN_DROP, logits_of(SCORES))
    assert experts_of(mask) == [[1], [0, 2], [0], [1, 3]]
    assert mask.dtype == torch.bool and mask.sum(0).tolist() == [2, 2, 1, 1]
    assert torch.equal(kept, probs.where(mask, 0.0))
    drops = router.last_drops
    assert (drops.routed, drops.dropped, drops.added, drops.orphans) == (8, 2, 0, 0)
    assert drops.mass_kept == pytest.approx(4 - 0.5 / 0.8 - 0.25 / 0.8)
    assert router.last_drops is drops


def test_free_slots_of_local_experts_go_to_the_best_scores():
    (probs, chosen), (kept, mask), router = both(config_of(4, 2), EXPANDED_DROP, logits_of(SCORES))
    assert experts_of(mask) == [[1, 2], [0, 2], [0, 3], [1, 3]]
    assert torch.equal(kept[chosen & mask], probs[chosen & mask])
    # The weight of an extra is its score over the sum of the original top-k's.
    assert kept[0, 2].item() == pytest.approx(0.15 / 0.8, rel=1e-5)
    assert kept[2, 3].item() == pytest.approx(0.08 / 0.8, rel=1e-5)
    assert (router.last_drops.dropped, router.last_drops.added) == (2, 2)


@pytest.mark.parametrize(
    ("order", "wanted"),
    [("first", [[0, 1], [0, 2], [1], [3]]), ("last", [[], [0, 2], [0, 1], [1, 3]])],
)
def test_order_first_keeps_early_tokens_and_last_late_ones(order, wanted):
    capacity = dataclasses.replace(TOKEN_DROP, order=order)
    _, (kept, mask), router = both(config_of(4, 2), capacity, logits_of(SCORES))
    assert experts_of(mask) == wanted
    assert router.last_drops.orphans == wanted.count([])
    assert not kept[~mask].any()


def test_equal_scores_keep_the_lower_tokens_and_orphans_get_exactly_zero():
    _, (kept, mask), router = both(config_of(4, 2), TOKEN_DROP, logits_of(SCORES[:1] * 4))
    assert experts_of(mask) == [[0, 1], [0, 1], [], []]
    assert torch.equal(kept[2:], torch.zeros(2, 4))
    assert router.last_drops.orphans == 2


def test_the_ceiling_is_exact():
    # gamma = 1.1 with a mean load of 10 is 11: in binary it would be 12.
    config, logits = config_of(4, 2), logits_of(SCORES[:1] * 20)
    capacity = dataclasses.replace(TOKEN_DROP, factor="1.1")
    _, (_, mask), _ = both(config, capacity, logits)
    assert mask.sum(0).tolist() == [11, 11, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factor", ["2", "2.5", "inf"])
@pytest.mark.parametrize("policy", ["token_drop", "expanded_drop"])
def test_from_gamma_e_over_k_on_the_result_is_megatrons_bit_for_bit(policy, factor, dtype):
    capacity = CapacityConfig(policy=policy, factor=factor)
    own, capped, router = both(config_of(4, 2), capacity, random_logits(33, 4).to(dtype))
    assert torch.equal(own[0], capped[0]) and torch.equal(own[1], capped[1])
    assert capped[0].dtype == dtype
    assert (router.last_drops.routed, router.last_drops.dropped) == (66, 0)


def test_policy_none_is_megatrons_router_whatever_the_mask():
    padding = torch.zeros(33, 1, dtype=torch.bool)
    padding[5:9] = True
    own, capped, router = both(config_of(4, 2), CapacityConfig(), random_logits(33, 4), padding)
    assert torch.equal(own[0], capped[0]) and torch.equal(own[1], capped[1])
    assert router.last_drops == LayerDrops()


def test_policy_none_leaves_megatrons_own_capacity_alone():
    config = config_of(4, 2, moe_expert_capacity_factor=1.0)
    own, capped, _ = both(config, CapacityConfig(), random_logits(33, 4))
    assert torch.equal(own[0], capped[0]) and torch.equal(own[1], capped[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_survivors_keep_every_bit_in_any_dtype(dtype):
    logits = random_logits(40, 6).to(dtype)
    own, (kept, mask), _ = both(config_of(6, 2), TOKEN_DROP, logits)
    assert kept.dtype == dtype and 0 < mask.sum() < 80
    assert torch.equal(kept, own[0].where(mask, 0.0))


@pytest.mark.parametrize("policy", ["token_drop", "expanded_drop"])
def test_padding_takes_no_capacity_and_gets_no_expert(policy):
    config, logits = config_of(6, 2), random_logits(40, 6)
    padding = torch.zeros(40, 1, dtype=torch.bool)
    padding[[0, 3, 4, 17, 39]] = True
    logits[padding] = float("nan")  # must not be read
    capacity = CapacityConfig(policy=policy, factor="1")
    without = make_router(config, capacity).routing(logits[~padding][:, None])
    router = make_router(config, capacity)
    probs, mask = router.routing(logits, padding_mask=padding)
    real = ~padding.flatten()
    assert torch.equal(probs[real], without[0]) and torch.equal(mask[real], without[1])
    assert not probs[~real].any() and not mask[~real].any()
    assert mask.sum(0).max() == -(-35 * 2 // 6)
    assert router.last_drops.routed == 70


def test_a_mask_of_other_tokens_is_refused():
    router = make_router(config_of(4, 2), TOKEN_DROP)
    with pytest.raises(ValueError, match=r"padding_mask: has 3 entries for 4 tokens"):
        router.routing(logits_of(SCORES), padding_mask=torch.zeros(3, 1, dtype=torch.bool))


def test_no_tokens_are_no_trouble():
    router = make_router(config_of(4, 2), EXPANDED_DROP)
    probs, mask = router.routing(torch.empty(0, 1, 4))
    assert probs.shape == mask.shape == (0, 4)
    assert router.last_drops == LayerDrops()


def test_tokens_of_a_phase_outside_capacity_pass_untouched():
    config, logits = config_of(4, 2), logits_of(SCORES)
    router = make_router(config, TOKEN_DROP)
    router.phase = "decode"
    own = make_router(config, None).routing(logits)
    probs, mask = router.routing(logits)
    assert torch.equal(probs, own[0]) and torch.equal(mask, own[1])
    assert router.last_drops == LayerDrops()
    router.phase = "prefill"
    assert router.routing(logits)[1].sum() == 6


def test_gradients_reach_what_was_kept_and_added():
    logits = logits_of(SCORES).requires_grad_()
    router = make_router(config_of(4, 2), EXPANDED_DROP)
    probs, _ = router.routing(logits)
    probs[0, 2].backward()  # the extra: .15 / (.5 + .3)
    assert logits.grad is not None
    assert logits.grad[0, 0].tolist() == pytest.approx(
        [-0.1875 * 0.625, -0.1875 * 0.375, 0.1875, 0.0], abs=1e-6
    )
    assert not logits.grad[1:].any()


FAMILIES = {
    "softmax of the chosen": {},
    "softmax of all": {"moe_router_pre_softmax": True},
    "scaled": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "groups": {
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 1.5,
    },
    "bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
}
RULES = [
    {},
    {"order": "last"},
    {"order": "random", "seed": 7},
    {"renormalize": True},
    {"consensus": "quota"},
    {"consensus": "local", "factor": "0.7"},
    {"scope": "rank", "factor": "0.5"},
    {"policy": "expanded_drop"},
    {"policy": "expanded_drop", "extras": "dropped", "expand": 1},
    {"policy": "expanded_drop", "tiers": "one", "renormalize": True},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_rule_is_the_references(family, rules):
    num_experts, top_k, layer = 8, 2, 3
    rules = {"policy": "token_drop", "factor": "1", **rules}
    config = config_of(num_experts, top_k, **FAMILIES[family])
    logits = random_logits(48, num_experts)
    with no_cuda():
        own = make_router(config, None, layer=layer)
        router = make_router(config, CapacityConfig(**rules), layer=layer)
    for each in (own, router):
        if each.expert_bias is not None:
            each.expert_bias.copy_(torch.linspace(0, 0.3, num_experts))
    probs, chosen = own.routing(logits)
    got, mask = router.routing(logits)

    scores = router_scores(logits[:, 0], config.moe_router_score_function)
    ids = chosen.nonzero()[:, 1].view(-1, top_k)
    number = np.arange(len(logits))
    tokens = reference.RankInput(
        scores=scores.numpy(),
        topk_ids=ids.numpy(),
        weights=probs.gather(1, ids).numpy(),
        request=np.zeros_like(number),
        position=number,
        competes=np.ones(len(logits), dtype=bool),
    )
    softmax = config.moe_router_score_function == "softmax"
    outcome = reference.decide(
        [tokens],
        reference.Rules(**rules, layer=layer),
        reference.Family(
            normalize=not (softmax and config.moe_router_pre_softmax),
            scale=config.moe_router_topk_scaling_factor or 1.0,
        ),
        [0, num_experts],
        num_experts,
        top_k,
    )
    (wanted,) = outcome.ranks
    assert experts_of(mask) == [sorted(weights) for weights in wanted.weights]
    for t, weights in enumerate(wanted.weights):
        assert {e: got[t, e].item() for e in weights} == pytest.approx(weights, rel=1e-5)
    assert not got[~mask].any()
    assert router.last_drops.dropped == (~wanted.keep).sum()
    assert router.last_drops.added == sum(map(len, wanted.extras))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"moe_expert_capacity_factor": 1.25}, r"moe_expert_capacity_factor = 1.25: .*to 4.0"),
        ({"moe_expert_capacity_factor": None}, r"moe_expert_capacity_factor = None: .*to 4.0"),
        ({"moe_pad_expert_input_to_capacity": True}, r"input_to_capacity = True: .*to False"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, r"'sinkhorn': .*use aux_loss or none"),
        ({"moe_token_dispatcher_type": "flex"}, r"moe_token_dispatcher_type = 'flex': .*alltoall"),
        (
            {"transformer_impl": "inference_optimized"},
            r"transformer_impl = .*use transformer_engine",
        ),
        ({"moe_router_score_function": "tanh"}, r"'tanh': must be one of softmax, sigmoid"),
    ],
)
def test_settings_of_megatron_that_contradict_capacity_are_refused(settings, text):
    config = config_of(4, 2)
    for name, value in settings.items():  # Megatron itself refuses some where this machine lacks
        setattr(config, name, value)
    with pytest.raises(ValueError, match=text):
        make_router(config, TOKEN_DROP)


def test_a_factor_at_which_megatron_drops_nothing_changes_no_bit():
    logits = random_logits(33, 4)
    own = make_router(config_of(4, 2, moe_expert_capacity_factor=None), None).routing(logits)
    with_factor = make_router(config_of(4, 2), None).routing(logits)
    assert torch.equal(own[0], with_factor[0]) and torch.equal(own[1], with_factor[1])


def test_the_allgather_dispatcher_needs_no_factor():
    settings = {"moe_token_dispatcher_type": "allgather", "moe_expert_capacity_factor": None}
    router = make_router(config_of(4, 2, **settings), TOKEN_DROP)
    assert router.routing(logits_of(SCORES))[1].sum() == 6


def test_tensor_ranks_that_hold_the_same_tokens_are_refused():
    config = config_of(4, 2)
    with pytest.raises(ValueError, match=r"sequence_parallel = False: 2 tensor-parallel ranks"):
        check_settings(config, tensor_ranks=2, expert_tensor_ranks=1)
    with pytest.raises(ValueError, match=r"expert_tensor_parallel_size = 2: .*set it to 1"):
        check_settings(config, tensor_ranks=1, expert_tensor_ranks=2)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"policy": "drop"}, r"moe.capacity.policy = 'drop'"),
        ({"policy": "token_drop", "factor": "-1"}, r"moe.capacity.factor = '-1'"),
        ({"policy": "token_drop", "tiers": "one"}, r"moe.capacity.tiers = 'one': only"),
        ({"policy": "token_drop", "speed_aware": True}, r"speed_aware = True: .*must be False"),
    ],
)
def test_a_capacity_that_means_nothing_here_is_refused_before_a_router_is_built(settings, text):
    with pytest.raises(ValueError, match=text):
        capacity_router(CapacityConfig(**settings))


def test_a_capacity_that_the_model_cannot_honour_is_refused():
    capacity = CapacityConfig(policy="expanded_drop", expand=5)
    with pytest.raises(ValueError, match=r"moe.capacity.expand = 5: must be at most 4"):
        make_router(config_of(4, 2), capacity)


def test_a_score_that_is_no_number_names_the_layer():
    logits = logits_of(SCORES)
    logits[1, 0, 2] = float("nan")
    router = make_router(config_of(4, 2), TOKEN_DROP, layer=12)
    with pytest.raises(ValueError, match=r"layer 12: router scores are NaN or infinite on rank 0"):
        router.routing(logits)


def test_keyword_arguments_of_later_versions_are_passed_on():
    build = capacity_router(TOKEN_DROP)
    with pytest.raises(TypeError, match="no_version_has_this"):
        build(config=config_of(4, 2), pg_collection=groups(), no_version_has_this=True)
