"""The search for placements. Run: pytest tests/unit/moe/placement/test_layer_search.py"""

import itertools

import numpy as np
import pytest

from engine.moe.placement.layer_search import frontier, improve_layer, plan_layer
from engine.moe.placement.placement import LayerPlacement
from engine.moe.placement.predict import predicted_share
from engine.moe.placement.problem import make_problem


def skewed(steps, experts, seed=0, exponent=1.0, noise=0.1, rows=8000):
    """Loads with zipf popularity in a random order and a little noise."""
    draw = np.random.default_rng(seed)
    weight_E = (draw.permutation(experts) + 1.0) ** -exponent
    weight_SE = weight_E * np.exp(noise * draw.standard_normal((steps, experts)))
    return (rows * weight_SE / weight_SE.sum(1, keepdims=True)).astype(np.int64)


def on_ranks(layer, num_ranks):
    return np.bincount([r for ranks in layer.copies_E for r in ranks], minlength=num_ranks)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_copy_less_than_ranks_suffices_for_loads_that_are_known(ranks, seed):
    loads_SE = skewed(1, 16, seed)
    layer = plan_layer({"a": loads_SE}, ranks, num_copies=ranks - 1)
    assert layer.num_copies == ranks - 1
    assert predicted_share(layer, loads_SE, ranks) > 0.999


def test_a_small_layer_gets_a_plan_that_one_search_alone_may_miss():
    # Recorded loads of two kinds of traffic; one search alone ends between .918 and .950 on text.
    domains = {
        "text": np.array([[5186, 3102, 122, 2753, 3854, 402, 300, 1226]]),
        "tasks": np.array([[1539, 498, 2799, 1130, 1430, 3374, 2071, 1196]]),
    }
    for seed in (0, 1):
        layer = plan_layer(domains, 8, num_copies=8, seed=seed)
        assert min(predicted_share(layer, each, 8) for each in domains.values()) > 0.98


def test_the_search_finds_what_trying_all_finds():
    loads_SE = skewed(6, 6, 3, noise=0.4)
    homes = LayerPlacement.contiguous(6, 3).home_E
    places = [(e, r) for e in range(6) for r in range(3) if r != homes[e]]
    best = 0.0
    for pair in itertools.combinations(places, 2):
        if pair[0][1] != pair[1][1]:  # one copy per rank, as in the search
            copies = tuple(tuple(sorted(r for e, r in pair if e == n)) for n in range(6))
            best = max(best, predicted_share(LayerPlacement(homes, copies), loads_SE, 3))
    layer = plan_layer({"a": loads_SE}, 3, num_copies=2, keep_homes=True)
    assert layer.home_E == homes
    assert predicted_share(layer, loads_SE, 3) >= best - 0.003


def test_equal_seeds_give_equal_placements():
    domains = {"a": skewed(10, 16, 0), "b": skewed(12, 16, 1)}
    first, second = (plan_layer(domains, 4, num_copies=4, seed=5) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("keep_homes", [False, True])
def test_a_placement_is_valid_and_its_copies_are_spread_over_the_ranks(keep_homes):
    for ranks, experts, copies in ((3, 7, 5), (4, 16, 4), (5, 5, 12), (6, 9, 0)):
        loads_SE = skewed(5, experts, ranks)
        layer = plan_layer({"a": loads_SE}, ranks, num_copies=copies, keep_homes=keep_homes)
        assert layer.problems(ranks) == [] and layer.num_copies == copies
        assert on_ranks(layer, ranks).max() <= -(-copies // ranks)
        homes_W = np.bincount(layer.home_E, minlength=ranks)
        contiguous = LayerPlacement.contiguous(experts, ranks).home_E
        assert homes_W.tolist() == np.bincount(contiguous).tolist()


def test_no_more_copies_are_placed_than_ranks_can_hold():
    layer = plan_layer({"a": skewed(3, 4)}, 2, num_copies=50)
    assert layer.num_copies == 4  # every expert is on both ranks


def test_a_plan_for_two_domains_is_good_for_each():
    text, tasks = skewed(20, 16, 0), skewed(20, 16, 9)
    alone = plan_layer({"text": text}, 4, num_copies=4)
    both = plan_layer({"text": text, "tasks": tasks}, 4, num_copies=4)
    assert min(predicted_share(both, loads_SE, 4) for loads_SE in (text, tasks)) > 0.97
    assert predicted_share(both, tasks, 4) > predicted_share(alone, tasks, 4)


def test_domains_count_alike_however_many_rows_they_have():
    text, tasks = skewed(20, 16, 0), skewed(20, 16, 9, rows=80)
    layer = plan_layer({"text": text, "tasks": tasks}, 4, num_copies=4)
    assert min(predicted_share(layer, loads_SE, 4) for loads_SE in (text, tasks * 100)) > 0.95


def test_experts_that_are_hot_together_get_different_homes():
    # Equal on average; 0 and 1 are hot in even steps, 2 and 3 in odd ones.
    loads_SE = np.tile([[90, 90, 10, 10], [10, 10, 90, 90]], (10, 1))
    layer = plan_layer({"a": loads_SE}, 2, num_copies=0)
    assert layer.home_E[0] != layer.home_E[1] and layer.home_E[2] != layer.home_E[3]


def test_a_cost_of_rows_between_nodes_keeps_more_rows_inside():
    loads_SE = skewed(10, 16, 4)
    cheap, dear = (
        plan_layer({"a": loads_SE}, 4, num_copies=8, nodes=2, node_cost=cost) for cost in (0.0, 1.0)
    )
    assert leaving(dear, loads_SE) < 0.9 * leaving(cheap, loads_SE)


def leaving(layer, loads_SE):
    """Rows that leave a node at best: of experts that are on one of the two nodes, half."""
    nodes = [{rank // 2 for rank in layer.hosts(e)} for e in range(len(layer.home_E))]
    return sum(loads_SE.sum(0)[e] / 2 for e, each in enumerate(nodes) if len(each) == 1)


def test_a_rank_at_half_speed_gets_half_the_rows():
    loads_SE = skewed(10, 16, 5)
    layer = plan_layer({"a": loads_SE}, 4, num_copies=4, row_times_W=(1, 1, 1, 2))
    assert predicted_share(layer, loads_SE, 4, (1, 1, 1, 2)) > 0.98
    assert predicted_share(layer, loads_SE, 4) < 1  # for equal ranks another one is best


def test_a_frontier_begins_without_copies_and_does_not_fall():
    loads_SE = skewed(10, 16, 6)
    layers = list(frontier({"a": loads_SE}, 4, (0, 1, 2, 4)))
    shares = [predicted_share(layer, loads_SE, 4) for layer in layers]
    assert [layer.num_copies for layer in layers] == [0, 1, 2, 4]
    assert shares == sorted(shares) and shares[-1] > 0.999


def test_a_few_moves_follow_loads_that_changed():
    before, after = skewed(10, 32, 0), skewed(10, 32, 9)
    layer = plan_layer({"a": before}, 4, num_copies=8)
    moved = improve_layer(layer, after, 4, max_moves=3)
    assert moved.home_E == layer.home_E
    assert on_ranks(moved, 4).tolist() == on_ranks(layer, 4).tolist()
    new = {
        (e, r)
        for e, ranks in enumerate(moved.copies_E)
        for r in ranks
        if r not in layer.copies_E[e]
    }
    assert 0 < len(new) <= 3
    assert predicted_share(moved, after, 4) > predicted_share(layer, after, 4) + 0.02


def test_nothing_moves_where_nothing_can_be_gained():
    loads_SE = skewed(1, 16)
    layer = plan_layer({"a": loads_SE}, 4, num_copies=4)
    assert improve_layer(layer, loads_SE, 4, max_moves=4) == layer


@pytest.mark.parametrize(
    ("domains", "ranks", "named"),
    [
        ({}, 2, "at least one domain"),
        ({"a": np.zeros((3, 4), dtype=np.int64)}, 2, "domain 'a': no recorded rows"),
        ({"a": np.ones((3, 4), dtype=np.int64)}, 5, "num_ranks = 5"),
    ],
)
def test_loads_that_cannot_be_planned_for_are_refused(domains, ranks, named):
    with pytest.raises(ValueError, match=named):
        make_problem(domains, ranks, (1,) * ranks)


def test_steps_are_imagined_only_where_loads_drift():
    noise = skewed(40, 16, noise=0.3)
    drifting = noise * np.linspace(1, np.arange(1, 17), 40)
    steps = [
        make_problem({"a": loads_SE}, 4, (1,) * 4).num_imagined
        for loads_SE in (noise[:3], np.repeat(noise[:1], 40, 0), drifting.astype(np.int64))
    ]
    assert steps == [0, 0, 40]
    assert make_problem({"a": drifting}, 4, (1,) * 4, margin=0.0).num_imagined == 0
