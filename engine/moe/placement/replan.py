"""Replan: which copies to replace for loads that have changed. Pure.

Homes stay, and every rank keeps as many copies, so that buffers and boundaries stay as they are:
a *move* gives one place of a rank's copies another expert.

Legend: E experts, W expert-parallel ranks, M moves of all layers, C of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.moe.placement.instances import Instances
from engine.moe.placement.layer_search import improvements
from engine.moe.placement.placement import LayerPlacement
from engine.moe.placement.predict import mean_times, slowest_times

_MOST_MOVED = 0.1  # of the experts of all layers, per change
_GAIN = 0.01  # of a layer's time in perfect balance, that each move must save


@dataclass(frozen=True, slots=True)
class Move:
    """One copy that is replaced."""

    layer: int
    rank: int  # of the copy
    place: int  # among the copies of the rank, in the order of its instances
    expert: int  # that it becomes
    source: int  # the rank of the expert's home


def choose_moves(
    layers: Mapping[int, Instances],
    loads_E: Mapping[int, np.ndarray],
    row_times_W: Sequence[float] | None = None,
) -> list[Move]:
    """Return the moves that save most time, at most a tenth of the experts of all layers.

    Args:
        layers: the layers that have copies.
        loads_E: int64, the rows of each expert to plan for, by layer.
        row_times_W: time per row of each rank; None: ranks are equal.
    """
    most = max(1, int(_MOST_MOVED * sum(each.num_experts for each in layers.values())))
    busy = [index for index in sorted(layers) if loads_E[index].any()]
    steps: list[list[LayerPlacement]] = []
    saved: list[np.ndarray] = []
    for index in busy:
        each, loads_1E = layers[index], loads_E[index][None]
        found = improvements(
            each.placement,
            loads_1E,
            each.num_ranks,
            max_moves=most,
            seed=index,
            row_times_W=row_times_W,
        )
        times = [
            float(slowest_times(layer, loads_1E, each.num_ranks, row_times_W)[0])
            for layer in (each.placement, *found)
        ]
        least = float(mean_times(loads_1E, each.num_ranks, row_times_W)[0])
        steps.append([each.placement, *found])
        saved.append(times[0] - np.array(times) - _GAIN * least * np.arange(len(times)))
    moves: list[Move] = []
    for index, layer, count in zip(busy, steps, best_counts(saved, most), strict=True):
        moves += _differences(index, layers[index], layer[count].copies_E)
    return sorted(moves, key=lambda move: (move.layer, move.rank, move.place))


def best_counts(saved: Sequence[np.ndarray], most: int) -> list[int]:
    """Return how many moves each layer gets, so that together they save most.

    A layer's second move may save more than its first, so counts are not chosen one by one.

    Args:
        saved: of each layer, by number of moves from 0.
        most: moves of all layers together.
    """
    best_M = np.zeros(most + 1)  # by moves spent
    choices: list[np.ndarray] = []
    for each in saved:
        count = min(len(each), most + 1)
        total_CM = np.full((count, most + 1), -np.inf)
        for moves in range(count):
            total_CM[moves, moves:] = best_M[: most + 1 - moves] + each[moves]
        choices.append(total_CM.argmax(0))
        best_M = total_CM.max(0)
    left, counts = int(best_M.argmax()), []
    for choice_M in reversed(choices):
        counts.append(int(choice_M[left]))
        left -= counts[-1]
    return counts[::-1]


def moved(instances: Instances, moves: Sequence[Move]) -> Instances:
    """Return the instances of a layer after its moves; other copies keep their places."""
    held = [list(each) for each in instances.copies]
    for move in moves:
        held[move.rank][move.place] = move.expert
    return instances.with_copies(held)


def _differences(layer: int, instances: Instances, copies_E: Sequence[Sequence[int]]) -> list[Move]:
    moves: list[Move] = []
    for rank, held in enumerate(instances.copies):
        wanted = [expert for expert, ranks in enumerate(copies_E) if rank in ranks]
        free = [place for place, expert in enumerate(held) if expert not in wanted]
        added = [expert for expert in wanted if expert not in held]
        for place, expert in zip(free, added, strict=True):
            source = instances.placement.home_E[expert]
            moves.append(Move(layer, rank, place, expert, source))
    return moves
