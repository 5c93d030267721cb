"""The greedy cut over copies, and the order it goes in. Run: pytest tests/unit/ops/test_cut.py"""

import itertools

import numpy as np
import pytest
import torch

from engine.ops import native, split_reference
from engine.ops.order_claims import order_claims, order_claims_reference
from engine.ops.split import Hosts, cut
from tests.helpers.random_hosts import random_hosts


def feasible(load_E, hosts, limit_W):
    """Hall's condition: no set of ranks has more rows that must be inside it than places."""
    inside_E = np.zeros(hosts.num_experts, dtype=np.int64)
    np.bitwise_or.at(inside_E, hosts.expert_I, 1 << hosts.rank_I)
    for ranks in range(1, 1 << hosts.num_ranks):
        places = sum(int(limit) for rank, limit in enumerate(limit_W) if ranks >> rank & 1)
        if load_E[(inside_E & ~ranks) == 0].sum() > places:
            return False
    return True


def greedy(expert_N, hosts, limit_W):
    """One claim after the other; returns which are kept."""
    kept_E = np.zeros(hosts.num_experts, dtype=np.int64)
    keep_N = np.zeros(len(expert_N), dtype=bool)
    for claim, expert in enumerate(expert_N):
        kept_E[expert] += 1
        keep_N[claim] = feasible(kept_E, hosts, limit_W)
        kept_E[expert] -= not keep_N[claim]
    return kept_E, keep_N


def random_case(rng, max_claims=60):
    num_ranks = int(rng.integers(1, 6))
    hosts = random_hosts(rng, num_ranks, int(rng.integers(1, 9)), int(rng.integers(0, 8)))
    popular_E = rng.dirichlet(np.full(hosts.num_experts, 0.5))
    expert_N = rng.choice(hosts.num_experts, int(rng.integers(0, max_claims)), p=popular_E)
    limit_W = rng.integers(0, 2 * len(expert_N) // num_ranks + 2, num_ranks)
    return expert_N, hosts, limit_W


@pytest.mark.parametrize("seed", range(150))
def test_kept_claims_are_those_of_the_greedy_that_tests_each_claim(seed):
    expert_N, hosts, limit_W = random_case(np.random.default_rng(seed))
    expected, keep_N = greedy(expert_N, hosts, limit_W)
    kept_E = cut(expert_N, hosts, limit_W)
    assert kept_E.tolist() == expected.tolist()
    assert split_reference.cut(expert_N, hosts, limit_W).tolist() == expected.tolist()
    assert cut(expert_N.astype(np.int32), hosts, limit_W).tolist() == expected.tolist()
    # The best of each expert: a closed expert stays closed.
    for expert in range(hosts.num_experts):
        kept = keep_N[expert_N == expert]
        assert kept[: kept.sum()].all()


@pytest.mark.parametrize("seed", range(40))
def test_what_is_kept_fits_and_no_dropped_claim_could_be_added(seed):
    expert_N, hosts, limit_W = random_case(np.random.default_rng(seed), 400)
    kept_E = cut(expert_N, hosts, limit_W)
    assert feasible(kept_E, hosts, limit_W)
    for expert in np.flatnonzero(kept_E < np.bincount(expert_N, minlength=hosts.num_experts)):
        more_E = kept_E.copy()
        more_E[expert] += 1
        assert not feasible(more_E, hosts, limit_W)


@pytest.mark.parametrize("seed", range(40))
def test_with_larger_limits_no_expert_keeps_fewer(seed):
    rng = np.random.default_rng(seed)
    expert_N, hosts, limit_W = random_case(rng, 400)
    more_W = limit_W + rng.integers(0, 5, len(limit_W))
    assert (cut(expert_N, hosts, more_W) >= cut(expert_N, hosts, limit_W)).all()


@pytest.mark.parametrize("seed", range(30))
def test_without_copies_each_rank_keeps_its_best(seed):
    rng = np.random.default_rng(seed)
    hosts = random_hosts(rng, 4, 12, 0)
    expert_N = rng.integers(0, 12, 300)
    limit_W = rng.integers(0, 120, 4)
    rank_E = np.empty(12, dtype=np.int64)
    rank_E[hosts.expert_I] = hosts.rank_I
    kept_E = np.zeros(12, dtype=np.int64)
    for rank, limit in enumerate(limit_W.tolist()):
        kept_E += np.bincount(expert_N[rank_E[expert_N] == rank][:limit], minlength=12)
    assert cut(expert_N, hosts, limit_W).tolist() == kept_E.tolist()


@pytest.mark.parametrize("seed", range(30))
def test_no_other_feasible_set_has_a_greater_sum_of_keys(seed):
    rng = np.random.default_rng(seed)
    expert_N, hosts, limit_W = random_case(rng, 11)
    key_N = np.sort(rng.random(len(expert_N)))[::-1]
    kept_E = cut(expert_N, hosts, limit_W)
    total = sum(key_N[expert_N == e][:kept].sum() for e, kept in enumerate(kept_E))
    best = 0.0
    for chosen in itertools.product((False, True), repeat=len(expert_N)):
        keep_N = np.array(chosen, dtype=bool)
        load_E = np.bincount(expert_N[keep_N], minlength=hosts.num_experts)
        if key_N[keep_N].sum() > best and feasible(load_E, hosts, limit_W):
            best = float(key_N[keep_N].sum())
    assert total == pytest.approx(best)


@pytest.mark.skipif(not native.available(), reason="the compiled library is not here")
@pytest.mark.parametrize("seed", range(15))
def test_the_compiled_cut_of_many_claims_equals_its_reference(seed):
    rng = np.random.default_rng(seed)
    hosts = random_hosts(rng, 12, 40, 30)
    expert_N = rng.choice(40, 3000, p=rng.dirichlet(np.full(40, 0.7)))
    limit_W = rng.integers(150, 350, 12)
    expected = split_reference.cut(expert_N, hosts, limit_W)
    assert cut(expert_N, hosts, limit_W).tolist() == expected.tolist()


def test_all_claims_stay_where_limits_allow_them():
    hosts = Hosts(2, np.array([0, 1, 1]), np.array([0, 1, 0]), np.array([True, True, False]))
    assert cut(np.array([1, 1, 0, 1]), hosts, np.array([2, 2])).tolist() == [1, 3]
    assert cut(np.array([1, 1, 0, 1]), hosts, np.array([2, 1])).tolist() == [1, 2]
    assert cut(np.array([], dtype=np.int64), hosts, np.array([2, 1])).tolist() == [0, 0]


@pytest.mark.parametrize("count", [0, 1, 2, 100, 5000])
@pytest.mark.parametrize("spread", [2, 1000, 2**31 - 1])
def test_claims_are_ordered_word_by_word_the_largest_first(count, spread):
    rng = np.random.default_rng(count)
    columns = [rng.integers(-spread, spread, count) for _ in range(2)]
    columns += [rng.permutation(count), rng.integers(-3, 3, count)]
    words = [torch.from_numpy(column.astype(np.int32)) for column in columns]
    for depth in range(1, 5):
        expected = np.lexsort([~column for column in reversed(columns[:depth])])
        assert order_claims(words[:depth]).tolist() == expected.tolist()
        assert order_claims_reference(words[:depth]).tolist() == expected.tolist()


def test_the_smallest_and_the_largest_word_are_ordered():
    word = torch.tensor([0, -(2**31), 2**31 - 1, -1, 2**31 - 1], dtype=torch.int32)
    for order in (order_claims, order_claims_reference):
        assert order([word]).tolist() == [2, 4, 0, 3, 1]
        assert order([torch.zeros_like(word), word]).tolist() == [2, 4, 0, 3, 1]
