"""Instances: numbers of homes and copies, and what replaces copies."""

from __future__ import annotations

import numpy as np
import torch

from engine.moe.placement.instances import Instances
from engine.moe.placement.placement import LayerPlacement
from engine.moe.placement.replan import Move, best_counts, choose_moves, moved
from engine.ops.panels import from_panels, to_panels

# Experts 0 2 | 1 3, a copy of 3 on rank 0.
LAYER = LayerPlacement((0, 1, 0, 1), ((), (), (), (0,)))


def test_instances_are_numbered_rank_by_rank_homes_before_copies():
    instances = Instances(LAYER, 2)
    assert instances.expert_I.tolist() == [0, 2, 3, 1, 3]
    assert instances.is_home_I.tolist() == [True, True, False, True, True]
    assert (instances.first_instances, instances.first_homes) == ([0, 3, 5], [0, 2, 4])
    assert instances.hosts_EH.tolist() == [[0, -1], [1, -1], [3, -1], [4, 2]]
    ids = torch.tensor([[0, 3], [-1, 1]])
    places = instances.to_home_order(ids)
    assert places.tolist() == [[0, 3], [-1, 2]]
    assert instances.homes(ids).tolist() == [[0, 4], [-1, 3]]
    assert instances.by_expert(np.array([10, 12, 11, 13])).tolist() == [10, 11, 12, 13]
    assert instances.fold(np.array([[1, 2, 3, 4, 5]])).tolist() == [[1, 2, 4, 8]]


def test_contiguous_homes_keep_the_experts_numbers():
    instances = Instances(LayerPlacement.contiguous(5, 2), 2)
    ids = torch.tensor([[4, 0]])
    assert instances.to_home_order(ids) is ids and instances.homes(ids) is ids
    assert (instances.most_homes, instances.most_local, instances.has_copies) == (3, 3, False)


def test_a_move_gives_a_place_another_expert_and_leaves_the_others():
    layer = LayerPlacement((0, 0, 0, 1, 1, 1), ((1,), (1,), (), (), (), ()))
    instances = moved(Instances(layer, 2), [Move(0, 1, 0, 2, 0)])
    assert instances.copies == [[], [2, 1]]
    assert instances.local_experts(1) == [3, 4, 5, 2, 1]
    assert instances.placement.copies_E == ((), (1,), (1,), (), (), ())


def test_copies_follow_the_loads_by_at_most_a_tenth_of_the_experts():
    layers = {
        index: Instances(LayerPlacement((0, 0, 0, 1, 1, 1), ((), (), (), (0,), (), ())), 2)
        for index in range(4)
    }
    loads = {index: np.array([90, 5, 5, 5, 5, 5]) for index in layers}
    moves = choose_moves(layers, loads)
    assert len(moves) <= 2  # of 24 experts
    assert not moves, "rank 1 holds no copy: nothing it could be given helps"
    layers = {
        index: Instances(LayerPlacement((0, 0, 0, 1, 1, 1), ((), (1,), (), (), (), ())), 2)
        for index in range(4)
    }
    moves = choose_moves(layers, loads)
    assert 1 <= len(moves) <= 2
    assert all((move.expert, move.rank, move.source) == (0, 1, 0) for move in moves)
    even = {index: np.full(6, 10) for index in layers}
    assert choose_moves(layers, even) == []


def test_from_panels_returns_what_to_panels_has_rearranged():
    for rows, stacked in ((32, 1), (40, 2), (20, 1), (64, 2)):
        weights = torch.randn(3, rows, 8)
        plain = weights.clone()
        to_panels(weights, stacked)
        for index in range(3):
            assert torch.equal(from_panels(weights, index, stacked), plain[index])


def test_moves_go_to_the_layers_where_they_save_most_together():
    alone = np.array([0.0, 5.0, 6.0, 6.5])
    together = np.array([0.0, -1.0, 20.0])  # two moves that help only as a pair
    assert best_counts([alone, together], 0) == [0, 0]
    assert best_counts([alone, together], 1) == [1, 0]
    assert best_counts([alone, together], 2) == [0, 2]
    assert best_counts([alone, together], 3) == [1, 2]
    assert best_counts([alone, together], 9) == [3, 2]
    assert best_counts([np.array([0.0, -1.0])], 4) == [0]
    assert best_counts([], 4) == []
