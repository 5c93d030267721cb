"""The properties that expert capacity must have, each one a test. Run: pytest
tests/unit/moe/capacity/test_capacity_properties.py

Outputs bit for bit through real layers are in tests/distributed/test_capacity_layer.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from engine.moe.capacity.decision import Decision
from engine.moe.router import Routing
from tests.helpers.capacity_cases import GAMMAS, Case, cases, make_tokens, run_engine
from tests.helpers.reference import capacity_of

PROPERTY = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.data_too_large,
    ],
)
TOP_K_CUT = {"policy": "token_drop", "consensus": "global"}


def with_rules(case: Case, **rules) -> Case:
    return dataclasses.replace(case, rules=case.rules | rules)


def kept_by_expert(case: Case, tokens, decisions: list[Decision | None]) -> np.ndarray:
    """Competing assignments that each expert keeps, over all ranks."""
    return np.bincount(
        [e for e, _ in kept_set(case, tokens, decisions)], minlength=case.num_experts
    )


def kept_set(case: Case, tokens, decisions: list[Decision | None]) -> set[tuple[int, int]]:
    """(expert, row of the token in the whole case) of competing assignments that were kept."""
    ids_TK = tokens.routing.topk_ids_TK.numpy()
    kept = set()
    for rank, decision in enumerate(decisions):
        for row, t in enumerate(np.flatnonzero(tokens.owner == rank)):
            keep_K = np.ones(case.top_k, bool) if decision is None else decision.keep_TK[row]
            if tokens.competes[t]:
                kept |= {(int(e), int(t)) for e, k in zip(ids_TK[t], keep_K, strict=True) if k}
    return kept


def loads(case: Case, tokens) -> tuple[np.ndarray, int]:
    """N_e of competing tokens, and C."""
    ids = tokens.routing.topk_ids_TK.numpy()[tokens.competes]
    capacity = capacity_of(
        case.rules["factor"], int(tokens.competes.sum()), case.top_k, case.num_experts
    )
    return np.bincount(ids.ravel(), minlength=case.num_experts), capacity


@PROPERTY
@given(cases(**TOP_K_CUT, scope="expert"))
def test_1_an_expert_keeps_exactly_min_of_its_load_and_capacity(case):
    tokens = make_tokens(case)
    before, capacity = loads(case, tokens)
    after = kept_by_expert(case, tokens, run_engine(case, tokens))
    assert after.tolist() == np.minimum(before, capacity).tolist()


@PROPERTY
@given(cases(**TOP_K_CUT, scope="expert"))
def test_2_what_is_kept_is_the_best_by_order_then_by_token_id(case):
    case = with_rules(case, order="score")
    tokens = make_tokens(case)
    _, capacity = loads(case, tokens)
    kept = kept_set(case, tokens, run_engine(case, tokens))
    scores, ids = tokens.routing.scores_TE.numpy(), tokens.routing.topk_ids_TK.numpy()
    for expert in range(case.num_experts):
        claims = [t for t in np.flatnonzero(tokens.competes) if expert in ids[t]]
        claims.sort(key=lambda t: (-scores[t, expert], tokens.request[t], tokens.position[t]))
        assert {t for e, t in kept if e == expert} == set(claims[:capacity])


def test_2_equal_scores_keep_the_lowest_token_ids():
    case = Case(
        tokens=(3, 0, 4), num_experts=6, top_k=2, rules=TOP_K_CUT | {"factor": "1"}, levels=0
    )
    tokens = make_tokens(case)
    # All tokens score all experts alike, so torch's top-k sends all 7 to the same two experts.
    assert len(np.unique(tokens.routing.topk_ids_TK)) == 2
    kept = kept_set(case, tokens, run_engine(case, tokens))
    by_id = sorted(range(7), key=lambda t: (tokens.request[t], tokens.position[t]))
    assert capacity_of("1", 7, 2, 6) == 3
    assert {t for _, t in kept} == set(by_id[:3]) and len(kept) == 6


@PROPERTY
@given(cases())
def test_3_a_factor_of_experts_over_k_decides_nothing(case):
    exact = f"{case.num_experts / case.top_k:.0f}"
    assume(int(exact) * case.top_k >= case.num_experts)
    for factor in (exact, "1000", "inf"):
        assert run_engine(with_rules(case, factor=factor)) == [None] * len(case.tokens)


@PROPERTY
@given(cases(**TOP_K_CUT, scope="expert"), st.sampled_from(["0.25", "0.5", "0.9", "1"]))
def test_4_up_to_factor_one_the_fullest_expert_keeps_exactly_its_capacity(case, factor):
    case = with_rules(case, factor=factor)
    tokens = make_tokens(case)
    assume(tokens.competes.any())
    _, capacity = loads(case, tokens)
    assert kept_by_expert(case, tokens, run_engine(case, tokens)).max() == capacity


@PROPERTY
@given(cases(policy="token_drop"), st.sampled_from(GAMMAS), st.sampled_from(GAMMAS))
def test_5_a_larger_factor_keeps_all_that_a_smaller_one_keeps(case, one, other):
    # Shares of a quota are rounded, and need not grow together; the rule is that of the others.
    assume(case.rules["consensus"] != "quota")
    tokens = make_tokens(case)
    small, large = sorted((one, other), key=float)
    few = kept_set(case, tokens, run_engine(with_rules(case, factor=small), tokens))
    many = kept_set(case, tokens, run_engine(with_rules(case, factor=large), tokens))
    assert few <= many


@PROPERTY
@given(cases(**TOP_K_CUT, scope="expert"))
def test_6_the_dropped_share_is_what_overflows(case):
    tokens = make_tokens(case)
    before, capacity = loads(case, tokens)
    kept = len(kept_set(case, tokens, run_engine(case, tokens)))
    assert before.sum() - kept == np.maximum(0, before - capacity).sum()


@PROPERTY
@given(cases(renormalize=False))
def test_7_survivors_keep_their_weights_bit_for_bit_and_orphans_have_none(case):
    tokens = make_tokens(case)
    for rank, decision in enumerate(run_engine(case, tokens)):
        if decision is None:
            continue
        weights_TK = tokens.routing.topk_weights_TK[torch.from_numpy(tokens.owner == rank)]
        own_TK = decision.weights_TM[:, : case.top_k]
        assert torch.equal(own_TK[decision.keep_TK], weights_TK[decision.keep_TK])
        orphan_T = (decision.ids_TM < 0).all(1)
        assert not decision.weights_TM[orphan_T].any()
        assert decision.weights_TM.isfinite().all()


@PROPERTY
@given(cases(**TOP_K_CUT), st.randoms(use_true_random=False))
def test_8_score_does_not_depend_on_the_positions_of_tokens(case, random):
    case = dataclasses.replace(with_rules(case, order="score"), levels=5)
    tokens = make_tokens(case)
    # Distinct scores, so that no tie asks for the token ids.
    noise = torch.rand(tokens.routing.scores_TE.shape, generator=torch.Generator().manual_seed(1))
    routing = dataclasses.replace(tokens.routing, scores_TE=noise)
    tokens = dataclasses.replace(tokens, routing=routing)
    places = list(range(len(tokens.request)))
    random.shuffle(places)
    moved = dataclasses.replace(
        tokens, request=tokens.request[places], position=tokens.position[places]
    )
    kept = kept_set(case, tokens, run_engine(case, tokens))
    assert kept_set(case, moved, run_engine(case, moved)) == kept


def test_8_first_and_last_do_care():
    for order in ("first", "last"):
        rules = TOP_K_CUT | {"factor": "0.5", "order": order}
        case = Case(tokens=(6,), num_experts=4, top_k=1, rules=rules, levels=0)
        tokens = make_tokens(case)
        moved = dataclasses.replace(
            tokens, request=tokens.request[::-1].copy(), position=tokens.position[::-1].copy()
        )
        kept = kept_set(case, tokens, run_engine(case, tokens))
        assert kept_set(case, moved, run_engine(case, moved)) != kept


@PROPERTY
@given(cases(policy="token_drop", consensus="global", scope="expert"), st.integers(0, 2**16))
def test_9_global_keeps_the_same_set_however_tokens_are_sharded(case, seed):
    tokens = make_tokens(case)
    total = sum(case.tokens)
    kept = kept_set(case, tokens, run_engine(case, tokens))
    for world in (1, 2, 3, 4, 8):
        if world > case.num_experts:
            continue
        owner = np.sort(np.random.default_rng(seed).integers(0, world, total))
        counts = tuple(np.bincount(owner, minlength=world).tolist())  # ragged, some empty
        other = dataclasses.replace(case, tokens=counts)
        resharded = dataclasses.replace(tokens, owner=owner)
        assert kept_set(other, resharded, run_engine(other, resharded)) == kept


@PROPERTY
@given(cases(policy="token_drop", scope="expert"))
def test_9_quota_keeps_as_many_of_each_expert_as_global(case):
    tokens = make_tokens(case)
    kept = [
        kept_by_expert(case, tokens, run_engine(with_rules(case, consensus=name), tokens)).tolist()
        for name in ("global", "quota")
    ]
    assert kept[0] == kept[1]


@PROPERTY
@given(cases())
def test_10_alone_all_consensus_is_the_same(case):
    case = dataclasses.replace(case, tokens=(sum(case.tokens),))
    tokens = make_tokens(case)
    one, two, three = (
        run_engine(with_rules(case, consensus=name), tokens)[0]
        for name in ("global", "quota", "local")
    )
    for other in (two, three):
        if one is None or other is None:
            for decision in (one, other):  # a rank that decided found nothing to do
                assert decision is None or decision.keep_TK.all()
        else:
            assert torch.equal(one.ids_TM, other.ids_TM)


@PROPERTY
@given(cases(policy="expanded_drop", tiers="two"))
def test_11_expanded_drop_keeps_all_that_token_drop_keeps_and_fills_only_free_local_slots(case):
    tokens = make_tokens(case)
    expanded = run_engine(case, tokens)
    plain = {"policy": "token_drop", "expand": None, "extras": "all"}
    dropped = run_engine(with_rules(case, **plain), tokens)
    before, capacity = loads(case, tokens)
    rules, bounds = case.rules, case.bounds
    passing = np.bincount(
        tokens.routing.topk_ids_TK.numpy()[~tokens.competes].ravel(), minlength=case.num_experts
    )
    for rank, (more, less) in enumerate(zip(expanded, dropped, strict=True)):
        if more is None:
            continue
        keep_TK = more.keep_TK if less is None else less.keep_TK
        assert torch.equal(more.keep_TK, keep_TK), "columns of top-k are Token Drop's"
        most_local = bounds[rank + 1] - bounds[rank]
        if rules["expand"] == 0:
            assert more.extra_Te is None
            continue
        assert more.extra_Te is not None and more.extra_Te.shape[1] == most_local
        limit = most_local if rules["expand"] is None else min(rules["expand"], most_local)
        added_T = more.extra_Te.sum(1)
        assert (added_T <= limit).all()
        if rules["extras"] == "dropped":
            assert (more.keep_TK.sum(1) + added_T <= case.top_k).all()
        if less is not None:  # nothing that another rank hosts has changed
            outside = np.r_[0 : bounds[rank], bounds[rank + 1] : case.num_experts]
            assert (more.counts_WE[rank, outside] == less.counts_WE[rank, outside]).all()
        own = slice(bounds[rank], bounds[rank + 1])
        rows_e = more.counts_WE.sum(0)[own] - passing[own]
        if rules["consensus"] != "local" and rules["scope"] == "expert":
            assert (rows_e <= capacity).all()
        if rules["consensus"] != "local" and rules["scope"] == "rank":
            assert rows_e.sum() <= capacity * most_local


@PROPERTY
@given(cases(**TOP_K_CUT, scope="rank"))
def test_12_a_ranks_pool_is_filled_and_drops_no_more_than_single_experts_would(case):
    tokens = make_tokens(case)
    before, capacity = loads(case, tokens)
    kept = kept_by_expert(case, tokens, run_engine(case, tokens))
    for start, end in zip(case.bounds, case.bounds[1:], strict=False):
        pooled = kept[start:end].sum()
        assert pooled == min(before[start:end].sum(), (end - start) * capacity)
        assert pooled >= np.minimum(before[start:end], capacity).sum()


def test_13_another_request_can_take_a_slot_away():
    rules = TOP_K_CUT | {"factor": "0.5"}
    alone = Case(tokens=(3,), num_experts=4, top_k=1, rules=rules)
    tokens = make_tokens(alone)
    scores = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.2, 0.5, 0.2, 0.1], [0.6, 0.2, 0.1, 0.1]])
    routing = Routing(scores, scores.argmax(1, keepdim=True), scores.amax(1, keepdim=True))
    tokens = dataclasses.replace(
        tokens,
        routing=routing,
        request=np.array([0, 0, 1]),
        position=np.array([0, 1, 0]),
        competes=np.ones(3, bool),
    )
    first_two = np.array([True, True, False])
    both = kept_set(alone, tokens, run_engine(alone, tokens))
    without = dataclasses.replace(
        tokens,
        routing=Routing(
            scores[first_two], routing.topk_ids_TK[first_two], routing.topk_weights_TK[first_two]
        ),
        request=np.array([0, 0]),
        position=np.array([0, 1]),
        competes=np.ones(2, bool),
        owner=np.zeros(2, int),
    )
    fewer = dataclasses.replace(alone, tokens=(2,))
    assert (0, 0) in kept_set(fewer, without, run_engine(fewer, without))
    assert (0, 0) not in both and (0, 2) in both, "C = 1: the better token of request 1 has it"


@PROPERTY
@given(cases(**TOP_K_CUT))
def test_14_no_rank_gets_more_than_its_capacity_so_the_bound_holds(case):
    tokens = make_tokens(case)
    assume(tokens.competes.all() and len(tokens.competes))
    decisions = run_engine(case, tokens)
    before, capacity = loads(case, tokens)
    after = kept_by_expert(case, tokens, decisions)
    starts = case.bounds[:-1]
    rank_before, rank_after = np.add.reduceat(before, starts), np.add.reduceat(after, starts)
    sizes = np.diff(case.bounds)
    assert (rank_after <= np.minimum(rank_before, sizes * capacity)).all()
    if decisions[0] is not None:
        assert np.add.reduceat(decisions[0].counts_WE.sum(0), starts).tolist() == list(rank_after)
        assert np.add.reduceat(decisions[0].before_WE.sum(0), starts).tolist() == list(rank_before)
        bound = rank_before.max() / rank_after.max()
        assert bound >= 1.0
        if case.rules["scope"] == "rank":
            assert bound == rank_before.max() / np.minimum(rank_before, sizes * capacity).max()


@pytest.mark.parametrize(
    ("factor", "tokens", "top_k", "experts", "expected"),
    [
        ("1.1", 40, 2, 8, 11),  # 1.1 * 10 is 11 in decimals; in binary 11.000000000000002
        ("1", 5, 2, 4, 3),
        ("0.0001", 5, 2, 4, 1),
        ("2.3", 100, 1, 10, 23),
        ("1.25", 0, 2, 4, 1),
        ("3", 7, 2, 4, 11),
    ],
)
def test_capacity_is_an_exact_ceiling_and_at_least_one(factor, tokens, top_k, experts, expected):
    from decimal import Decimal

    from engine.moe.capacity.limits import expert_capacity

    assert expert_capacity(Decimal(factor), tokens, top_k, experts) == expected
    assert capacity_of(factor, tokens, top_k, experts) == expected
