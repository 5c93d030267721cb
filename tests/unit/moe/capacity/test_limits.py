"""Capacity's parts by hand: limits, orders, shares, extras. Run: pytest
tests/unit/moe/capacity/test_limits.py
"""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import CapacityConfig
from engine.moe.capacity.agreement import CapacityAgreement
from engine.moe.capacity.decision import Decision
from engine.moe.capacity.expansion import choose_extras
from engine.moe.capacity.limits import Pools, cannot_bind
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.router import RouterSpec, Routing
from engine.moe.step import MoEStep
from engine.ops.claim_keys import random_key, sort_keys, sortable
from engine.ops.claims import ExtraRule, candidates
from engine.ops.select_top import quotas
from tests.helpers.reference import hash_key
from tests.helpers.threads import run_threads


def decide(
    ids: list[list[int]], scores: list[list[float]], num_experts: int, **settings
) -> Decision:
    """One rank; the tokens are positions of request 0. scores: of the chosen experts; others 0."""
    topk_ids_TK, topk_TK = torch.tensor(ids), torch.tensor(scores)
    scores_TE = torch.zeros(len(ids), num_experts).scatter_(1, topk_ids_TK, topk_TK)
    routing = Routing(scores_TE, topk_ids_TK, topk_TK)
    step = MoEStep.whole(torch.zeros(len(ids)), torch.arange(len(ids)), (len(ids),))
    spec = RouterSpec(num_experts=num_experts, top_k=len(ids[0]))

    def run(collectives) -> Decision:
        agreement = CapacityAgreement(
            spec,
            CapacityConfig(**settings),
            layer=0,
            layout=ExpertLayout([0, num_experts], 1),
            collectives=collectives,
        )
        return agreement.decide(routing, step)

    return run_threads(run, 1)[0]


def test_the_worked_example_of_capacity_holds():
    ids = [[0, 1], [0, 2], [0, 1], [0, 3], [1, 0]]
    scores = [[0.9, 0.1], [0.6, 0.1], [0.5, 0.1], [0.9, 0.1], [0.5, 0.4]]
    decision = decide(ids, scores, 4, policy="token_drop", factor="1")
    assert decision.keep_TK.int().tolist() == [[1, 1], [1, 1], [0, 1], [1, 1], [1, 0]]
    assert decision.ids_TM.tolist() == [[0, 1], [0, 2], [-1, 1], [0, 3], [1, -1]]
    assert decision.counts_WE.tolist() == [[3, 3, 1, 1]]
    assert decision.before_WE.tolist() == [[5, 3, 1, 1]]
    assert decision.order.token_N[:8].tolist() == [0, 1, 3, 0, 2, 4, 1, 3]
    assert decision.order.slot_TK.tolist() == [[0, 3], [1, 6], [-1, 4], [2, 7], [5, -1]]


@pytest.mark.parametrize(
    ("order", "kept"), [("score", [1, 3]), ("first", [0, 1]), ("last", [2, 3])]
)
def test_each_order_keeps_its_own(order, kept):
    # All four tokens choose expert 0; C = ceil(1 * 4 * 1 / 2) = 2.
    scores = [[0.1], [0.4], [0.2], [0.3]]
    decision = decide([[0]] * 4, scores, 2, policy="token_drop", factor="1", order=order)
    assert decision.keep_TK.flatten().nonzero().flatten().tolist() == kept


def test_an_order_of_one_pool_compares_experts_of_one_rank():
    # Rank scope on one rank: one pool of 2 * C = 2 * ceil(0.5 * 2 * 2 / 2) = 2 slots for 4 claims.
    scores = [[0.9, 0.3], [0.8, 0.7]]
    decision = decide([[0, 1], [1, 0]], scores, 2, policy="token_drop", factor="0.5", scope="rank")
    assert decision.keep_TK.int().tolist() == [[1, 0], [1, 0]]
    assert decision.counts_WE.tolist() == [[1, 1]]


def test_the_worked_example_of_quotas_holds():
    claims = torch.tensor([[4], [3], [3]])
    assert quotas(claims, torch.tensor([5])).flatten().tolist() == [2, 2, 1]
    assert quotas(claims, torch.tensor([10**6])).flatten().tolist() == [4, 3, 3]
    assert quotas(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([3])).tolist() == [[0], [0]]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(0, 200))
def test_quotas_use_every_slot_and_exceed_no_ranks_claims(claims, limit):
    given = quotas(torch.tensor(claims)[:, None], torch.tensor([limit])).flatten().tolist()
    assert sum(given) == min(sum(claims), limit)
    assert all(0 <= quota <= count for quota, count in zip(given, claims, strict=True))


def test_the_worked_example_of_expansion_holds():
    # This rank hosts experts 0 (one free slot) and 1 (none); t2 has expert 0 already.
    scores_TE = torch.zeros(3, 6)
    scores_TE[:, :2] = torch.tensor([[0.2, 0.5], [0.3, 0.1], [0.4, 0.1]])
    topk_ids_TK = torch.tensor([[1, 5], [2, 3], [0, 4]])
    position = torch.arange(3, dtype=torch.int32)
    step = MoEStep.whole(torch.zeros_like(position), position, (3,))
    extra_Te = choose_extras(
        Routing(scores_TE, topk_ids_TK, scores_TE.gather(1, topk_ids_TK)),
        step,
        torch.tensor([0, 1]),
        torch.tensor([1, 0]),
        ExtraRule(0, budget=2),
        None,
    )
    assert extra_Te.int().tolist() == [[0, 0], [1, 0], [0, 0]]


def test_a_token_asks_for_its_best_experts_only_and_the_lower_one_when_they_are_equal():
    scores_Te = torch.tensor([[0.1, 0.3, 0.3, 0.2]] * 3)
    allowed_Te = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    assert candidates(scores_Te, allowed_Te, 1).int().tolist() == [
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 0],
    ]
    budget_T1 = torch.tensor([[2], [0], [4]])
    assert candidates(scores_Te, allowed_Te, budget_T1).int().tolist() == [
        [0, 1, 1, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_sortable_integers_compare_as_the_scores_do(scores):
    keys = sortable(torch.tensor(scores, dtype=torch.float32)).tolist()
    for one, a in zip(scores, keys, strict=True):
        for other, b in zip(scores, keys, strict=True):
            assert (one < other) == (a < b) and (one == other) == (a == b)


@given(
    st.integers(0, 2**63 - 1), st.integers(0, 99), st.integers(0, 2**31 - 1), st.integers(0, 2**20)
)
def test_random_keys_are_the_documented_hash(seed, layer, request_number, position):
    ids = torch.tensor([[request_number, position]], dtype=torch.int32)
    key = random_key(seed, layer, ids[:, 0], ids[:, 1])
    assert key.tolist() == [hash_key(seed, layer, request_number, position)]


def test_keys_put_the_better_claim_first_and_count_the_primary_ones():
    request = torch.tensor([1, 0], dtype=torch.int32)
    position = torch.tensor([5, 9], dtype=torch.int32)
    common = {
        "score_N": torch.tensor([0.5, 0.5]),
        "request_N": request,
        "position_N": position,
        "expert_N": torch.tensor([2, 3]),
        "seed": 0,
        "layer": 0,
    }
    keys, num_primary = sort_keys("score", **common)
    assert num_primary == 1 and len(keys) == 4
    assert keys[0][0] == keys[0][1] and keys[1][1] > keys[1][0], "a tie goes to request 0"
    keys, num_primary = sort_keys("first", **common)
    assert num_primary == 2 and keys[0][1] > keys[0][0]
    keys, num_primary = sort_keys("last", **common)
    assert num_primary == 2 and keys[0][0] > keys[0][1]


@pytest.mark.parametrize(
    ("factor", "binds"), [("3.9999", True), ("4", False), ("4.0", False), ("inf", False)]
)
def test_a_factor_of_experts_over_k_cannot_bind(factor, binds):
    assert cannot_bind(Decimal(factor), 2, 8) is not binds


def test_pools_are_experts_or_ranks():
    assert Pools.make("expert", [0, 2, 3]) == Pools((0, 1, 2), (1, 1, 1), (0, 0, 1))
    assert Pools.make("rank", [0, 2, 3]) == Pools((0, 0, 1), (2, 1), (0, 1))


def test_renormalize_restores_the_sum_and_never_overflows():
    # Expert 0 is cut to one token; t1 is left with a weight so small that sum / weight is inf.
    tiny = 1e-45
    scores = [[1.0, 0.5], [0.9, tiny]]
    plain = decide([[0, 1], [0, 1]], scores, 4, policy="token_drop", factor="0.5")
    assert plain.keep_TK.int().tolist() == [[1, 1], [0, 0]]
    kept = decide([[0, 1], [0, 2]], scores, 4, policy="token_drop", factor="0.5", renormalize=True)
    assert kept.keep_TK.int().tolist() == [[1, 1], [0, 1]]
    assert torch.equal(kept.weights_TM[0], torch.tensor([1.0, 0.5])), "nothing dropped: untouched"
    assert kept.weights_TM[1].tolist() == [0.0, pytest.approx(0.9)]
    assert math.isinf((torch.tensor(0.9) / torch.tensor(tiny)).item())
