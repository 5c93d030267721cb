"""The exact split against brute force. Run: pytest tests/unit/ops/test_split.py"""

import itertools

import numpy as np
import pytest

from engine.ops import native, split_reference
from engine.ops.split import Hosts, batch_optimum, optimum, rank_loads, split_rows
from tests.helpers.random_hosts import random_hosts


def all_splits(load_E, hosts):
    """Every split, as rows of instances."""
    per_expert = []
    for expert, load in enumerate(load_E.tolist()):
        instances = np.flatnonzero(hosts.expert_I == expert).tolist()
        cuts = itertools.combinations_with_replacement(range(load + 1), len(instances) - 1)
        choices = []
        for cut in cuts:
            edges = (0, *cut, load)
            rows = [b - a for a, b in itertools.pairwise(edges)]
            choices.append(dict(zip(instances, rows, strict=True)))
        per_expert.append(choices)
    for choice in itertools.product(*per_expert):
        rows_I = np.zeros(len(hosts.expert_I), dtype=np.int64)
        for part in choice:
            for instance, rows in part.items():
                rows_I[instance] = rows
        yield rows_I


def moved(rows_I, hosts):
    return int(rows_I[~hosts.home_I].sum())


def densest_set(load_E, hosts):
    """The bound: rows of experts with all hosts in a set of ranks, over its size."""
    inside_E = np.zeros(len(load_E), dtype=np.int64)
    np.bitwise_or.at(inside_E, hosts.expert_I, 1 << hosts.rank_I)
    best = 0
    for ranks in range(1, 1 << hosts.num_ranks):
        rows = int(load_E[(inside_E & ~ranks) == 0].sum())
        best = max(best, -(-rows // ranks.bit_count()))
    return best


def small_case(rng):
    num_ranks, num_experts = int(rng.integers(1, 5)), int(rng.integers(1, 5))
    hosts = random_hosts(rng, num_ranks, num_experts, int(rng.integers(0, 5)))
    load_E = rng.integers(0, 6, num_experts)
    return load_E, hosts


def large_case(rng):
    num_ranks, num_experts = int(rng.integers(1, 20)), int(rng.integers(1, 40))
    hosts = random_hosts(rng, num_ranks, num_experts, int(rng.integers(0, 60)))
    load_E = (rng.pareto(1.0, num_experts) * 20).astype(np.int64).clip(max=2000)
    return load_E, hosts


def checked(rows_I, load_E, hosts):
    assert (rows_I >= 0).all()
    assert np.bincount(hosts.expert_I, rows_I, len(load_E)).tolist() == load_E.tolist()
    return rank_loads(rows_I, hosts)


@pytest.mark.parametrize("seed", range(60))
def test_loads_are_least_majorised_then_most_rows_are_at_home_then_lower_ranks_have_more(seed):
    rng = np.random.default_rng(seed)
    load_E, hosts = small_case(rng)
    rows_I = split_rows(load_E, hosts)
    load_W = checked(rows_I, load_E, hosts)

    def rank(rows):
        loads = rank_loads(rows, hosts)
        return (int((loads**2).sum()), moved(rows, hosts), (-loads).tolist())

    best = min(map(rank, all_splits(load_E, hosts)))
    assert rank(rows_I) == best
    least = min(rank_loads(rows, hosts).max() for rows in all_splits(load_E, hosts))
    assert load_W.max() == least


@pytest.mark.parametrize("seed", range(60))
def test_loads_over_speeds_are_least_majorised_within_limits(seed):
    rng = np.random.default_rng(seed)
    load_E, hosts = small_case(rng)
    speeds_W = rng.integers(1, 5, hosts.num_ranks)
    limit_W = rng.integers(0, 9, hosts.num_ranks)

    def rank(rows):
        # The sum over a rank's rows of (number of the row) / speed falls with every move that is
        # allowed; scaled by 12, which all speeds divide.
        loads = rank_loads(rows, hosts)
        potential = (loads * (loads + 1) // 2 * (12 // speeds_W)).sum()
        return (int(potential), moved(rows, hosts), (-loads).tolist())

    rows_I = split_rows(load_E, hosts, speeds_W=speeds_W)
    checked(rows_I, load_E, hosts)
    assert rank(rows_I) == min(map(rank, all_splits(load_E, hosts)))
    within = [r for r in all_splits(load_E, hosts) if (rank_loads(r, hosts) <= limit_W).all()]
    if within:
        rows_I = split_rows(load_E, hosts, speeds_W=speeds_W, limit_W=limit_W)
        checked(rows_I, load_E, hosts)
        assert rank(rows_I) == min(map(rank, within))
    else:
        with pytest.raises(ValueError, match="limit_W"):
            split_rows(load_E, hosts, speeds_W=speeds_W, limit_W=limit_W)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_fewest_rows_move_that_bring_every_rank_within_its_limit(seed, weighted):
    rng = np.random.default_rng(seed)
    load_E, hosts = small_case(rng)
    limit_W = rng.integers(0, 9, hosts.num_ranks)
    speeds_W = rng.integers(1, 5, hosts.num_ranks) if weighted else None
    rows_I = split_rows(load_E, hosts, speeds_W=speeds_W, limit_W=limit_W, fewest_moved=True)
    load_W = checked(rows_I, load_E, hosts)
    splits = list(all_splits(load_E, hosts))
    if not any((rank_loads(rows, hosts) <= limit_W).all() for rows in splits):
        speed_W = np.ones_like(limit_W) if speeds_W is None else speeds_W
        best = min((rank_loads(rows, hosts) * (12 // speed_W)).max() for rows in splits)
        limit_W = np.maximum(limit_W, best * speed_W // 12)
    assert (load_W <= limit_W).all()
    within = [rows for rows in splits if (rank_loads(rows, hosts) <= limit_W).all()]
    assert moved(rows_I, hosts) == min(moved(rows, hosts) for rows in within)


def test_nothing_moves_where_homes_are_within_the_limits():
    hosts = Hosts(2, np.array([0, 1, 0]), np.array([0, 1, 1]), np.array([True, True, False]))
    rows_I = split_rows(np.array([9, 3]), hosts, limit_W=np.array([9, 9]), fewest_moved=True)
    assert rows_I.tolist() == [9, 3, 0]
    rows_I = split_rows(np.array([9, 3]), hosts, limit_W=np.array([7, 7]), fewest_moved=True)
    assert rows_I.tolist() == [7, 3, 2]
    assert split_rows(np.array([9, 3]), hosts).tolist() == [6, 3, 3]


@pytest.mark.parametrize("seed", range(30))
def test_the_most_loaded_rank_equals_the_bound_of_the_densest_set_of_ranks(seed):
    rng = np.random.default_rng(seed)
    num_ranks = int(rng.integers(1, 9))
    hosts = random_hosts(rng, num_ranks, int(rng.integers(1, 20)), int(rng.integers(0, 20)))
    loads_SE = rng.integers(0, 1000, (5, hosts.num_experts))
    expected = [densest_set(load_E, hosts) for load_E in loads_SE]
    assert batch_optimum(loads_SE, hosts).tolist() == expected
    for load_E, most in zip(loads_SE, expected, strict=True):
        assert optimum(load_E, hosts) == most
        assert checked(split_rows(load_E, hosts), load_E, hosts).max() == most


@pytest.mark.parametrize("seed", range(20))
def test_no_row_can_move_from_a_rank_to_one_with_two_rows_fewer(seed):
    rng = np.random.default_rng(seed)
    load_E, hosts = large_case(rng)
    rows_I = split_rows(load_E, hosts)
    load_W = checked(rows_I, load_E, hosts)
    assert load_W.max() == optimum(load_E, hosts) == batch_optimum(load_E[None], hosts)[0]
    for source in range(hosts.num_ranks):
        reached, queue = {source}, [source]
        for rank in queue:
            for expert in hosts.expert_I[(hosts.rank_I == rank) & (rows_I > 0)]:
                for other in hosts.rank_I[hosts.expert_I == expert].tolist():
                    if other not in reached:
                        reached.add(other)
                        queue.append(other)
        assert load_W[source] - min(load_W[rank] for rank in reached) <= 1


@pytest.mark.skipif(not native.available(), reason="the compiled library is not here")
@pytest.mark.parametrize("seed", range(60))
def test_the_compiled_split_equals_its_reference(seed):
    rng = np.random.default_rng(seed)
    load_E, hosts = large_case(rng)
    speeds_W = rng.integers(1, 4, hosts.num_ranks) if seed % 3 == 0 else None
    limit_W = None
    if seed % 2:
        limit_W = load_E.sum() // hosts.num_ranks + rng.integers(1, 200, hosts.num_ranks)
    for fewest in (False, True) if limit_W is not None else (False,):
        expected = split_reference.split_rows(load_E, hosts, speeds_W, limit_W, fewest)
        options = {"speeds_W": speeds_W, "limit_W": limit_W, "fewest_moved": fewest}
        if expected is None:
            with pytest.raises(ValueError, match="limit_W"):
                split_rows(load_E, hosts, **options)
        else:
            assert split_rows(load_E, hosts, **options).tolist() == expected.tolist()
    assert split_reference.optimum(load_E, hosts) == batch_optimum(load_E[None], hosts)[0]


@pytest.mark.parametrize("seed", range(20))
def test_small_blocks_stay_at_home_where_the_optimum_allows_it(seed):
    rng = np.random.default_rng(seed)
    load_E, hosts = large_case(rng)
    whole_I = split_rows(load_E, hosts)
    full = rank_loads(whole_I, hosts)
    rows_I = split_rows(load_E, hosts, least_block=8)
    assert checked(rows_I, load_E, hosts).max() == full.max()

    def small(rows):
        return (rows > 0) & (rows < 8) & ~hosts.home_I

    if optimum(load_E, hosts.without(small(whole_I))) == full.max():
        assert not (rows_I[small(whole_I)]).any()
    limit_W = full + 5
    within = split_rows(load_E, hosts, limit_W=limit_W, fewest_moved=True, least_block=8)
    assert (checked(within, load_E, hosts) <= limit_W).all()


def test_a_block_of_few_rows_goes_home_where_the_optimum_stays():
    hosts = Hosts(2, np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([True, False, True]))
    assert split_rows(np.array([10, 7]), hosts).tolist() == [9, 1, 7]
    assert split_rows(np.array([10, 7]), hosts, least_block=4).tolist() == [9, 1, 7]
    limits = {"limit_W": np.array([9, 9]), "fewest_moved": True}
    assert split_rows(np.array([10, 7]), hosts, least_block=4, **limits).tolist() == [9, 1, 7]
    # An expert with two copies: one larger block does what two small ones did.
    hosts = Hosts(3, np.array([0, 0, 0]), np.arange(3), np.array([True, False, False]))
    limits["limit_W"] = np.array([8, 3, 12])
    rows_I = split_rows(np.array([15]), hosts, least_block=4, **limits)
    assert rows_I.tolist() == [8, 0, 7]


def test_hosts_that_cannot_be_are_refused():
    def hosts(expert, rank, home):
        return Hosts(2, np.array(expert), np.array(rank), np.array(home))

    with pytest.raises(ValueError, match="expert 1 has 0 homes"):
        hosts([0, 1], [0, 1], [True, False])
    with pytest.raises(ValueError, match="expert 0 has 2 homes"):
        hosts([0, 0], [0, 1], [True, True])
    with pytest.raises(ValueError, match="on rank 2: there are ranks 0 to 1"):
        hosts([0], [2], [True])
    with pytest.raises(ValueError, match="expert 0 is more than once on rank 1"):
        hosts([0, 0], [1, 1], [True, False])
    with pytest.raises(ValueError, match="needs limit_W"):
        split_rows(np.array([1]), hosts([0], [0], [True]), fewest_moved=True)
    with pytest.raises(ValueError, match="every speed must be at least 1"):
        split_rows(np.array([1]), hosts([0], [0], [True]), speeds_W=np.array([1, 0]))
