"""Replan: which copies to replace for loads that have changed. Pure.

Homes stay, and every rank keeps as many copies, so that buffers and boundaries stay as they are: a
*move* gives one place of a rank's copies another expert. Layers that gain most come first.

Legend: E experts, W expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.moe.placement.instances import Instances
from engine.moe.placement.layer_search import improve_layer
from engine.moe.placement.predict import predicted_share

_MOST_MOVED = 0.1  # of the experts of all layers, per change
_GAIN = 0.01  # of the share of perfect balance, below which a layer stays as it is


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
    """Return the moves that level these loads, at most a tenth of the experts of all layers.

    Args:
        layers: the layers that have copies.
        loads_E: int64, the rows of each expert to plan for, by layer.
        row_times_W: time per row of each rank; None: ranks are equal.
    """
    shares = {
        index: predicted_share(
            each.placement, loads_E[index][None], each.num_ranks, row_times_W=row_times_W
        )
        for index, each in layers.items()
        if loads_E[index].any()
    }
    left = max(1, int(_MOST_MOVED * sum(each.num_experts for each in layers.values())))
    moves: list[Move] = []
    for index in sorted(shares, key=lambda index: (shares[index], index)):
        if left <= 0:
            break
        each, loads_1E = layers[index], loads_E[index][None]
        better = improve_layer(
            each.placement,
            loads_1E,
            each.num_ranks,
            max_moves=left,
            seed=index,
            row_times_W=row_times_W,
        )
        share = predicted_share(better, loads_1E, each.num_ranks, row_times_W=row_times_W)
        if share < shares[index] + _GAIN:
            continue
        found = _differences(index, each, better.copies_E)
        moves += found
        left -= len(found)
    return sorted(moves, key=lambda move: (move.layer, move.rank, move.place))


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
