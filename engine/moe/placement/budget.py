"""Budget: how many copies each layer gets, from memory or from the share that is wanted.

Legend: S steps, E experts, L layers, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from engine.moe.placement.layer_search import frontier, plan_layer
from engine.moe.placement.placement import COPY_GROUP, LayerPlacement, Precision
from engine.moe.placement.predict import (
    mean_times,
    predicted_share,
    slowest_times,
)
from engine.moe.placement.problem import mixed_steps

# Of a weight and its share of a scale.
_BITS: Mapping[Precision, float] = {"int8": 8 + 32 / COPY_GROUP, "int4": 4 + 32 / COPY_GROUP}
_MOST_PER_RANK = 4  # copies per rank and layer, past which a target is given up


def copy_bytes(num_weights: int, weight_bytes: int, precision: Precision) -> int:
    """Return the bytes of one copy of an expert.

    Args:
        num_weights: of an expert, its three matrices together.
        weight_bytes: of one weight of the model.
        precision: of the copy.
    """
    if precision == "model":
        return num_weights * weight_bytes
    return int(np.ceil(num_weights * _BITS[precision] / 8))


def slots_for_memory(
    bytes_per_rank: float, bytes_per_copy: int, layers: Sequence[int], num_ranks: int
) -> dict[int, tuple[int, ...]]:
    """Return the copies that each rank may hold in each layer: as many as fit, spread evenly.

    Worked example, room for 3 copies on each of 2 ranks, 2 layers: 3 copies per layer, in the first
    layer 1 and 2 per rank, in the second 2 and 1.

    Raises:
        ValueError: no copy fits.
    """
    per_rank = int(bytes_per_rank // bytes_per_copy)
    if not per_rank:
        raise ValueError(
            f"{bytes_per_rank / 2**30:.3g} GiB per rank hold no copy of "
            f"{bytes_per_copy / 2**30:.3g} GiB; give more memory or a lower precision"
        )
    total = per_rank * num_ranks
    before = [total * number // len(layers) for number in range(len(layers) + 1)]
    # Of x slots, rank r has floor((x + r) / W): they add up to x, and differ by one at most.
    held = [[(x + rank) // num_ranks for rank in range(num_ranks)] for x in before]
    return {
        index: tuple(after - first for first, after in zip(*held[n : n + 2], strict=True))
        for n, index in enumerate(layers)
    }


def fewest_copies(
    domains: Mapping[str, np.ndarray],
    num_ranks: int,
    target: float,
    *,
    seed: int = 0,
    row_times_W: Sequence[float] | None = None,
    keep_homes: bool = False,
    nodes: int | None = None,
    node_cost: float = 0.0,
    effort: float = 0.25,
) -> int:
    """Return the fewest copies of a layer with which every domain's share reaches a target.

    Where none reaches it, the number that comes nearest to it.

    Args:
        domains: int64 [S, E] loads of each domain of traffic.
        num_ranks: W.
        target: share of perfect balance, of each domain and of all mixed.
        seed: of the search.
        row_times_W: time per row of each rank.
        keep_homes: homes stay contiguous.
        nodes: of the ranks.
        node_cost: of a row that leaves its node.
        effort: of each search.
    """
    search = partial(
        plan_layer,
        domains,
        num_ranks,
        seed=seed,
        row_times_W=row_times_W,
        keep_homes=keep_homes,
        nodes=nodes,
        node_cost=node_cost,
        effort=effort,
    )
    most = _MOST_PER_RANK * num_ranks
    counts, enough, best = doubling(most), most, (0.0, 0)
    below = -1
    layers = frontier(
        domains,
        num_ranks,
        counts,
        seed=seed,
        row_times_W=row_times_W,
        keep_homes=keep_homes,
        nodes=nodes,
        node_cost=node_cost,
        effort=effort,
    )
    for count, layer in zip(counts, layers, strict=True):
        found = worst_share(layer, domains, num_ranks, row_times_W)
        best = max(best, (found, -count))
        if found >= target:
            enough = count
            break
        below = count
    else:
        return -best[1]
    while enough - below > 1:
        middle = (below + enough) // 2
        layer = search(num_copies=middle)
        if worst_share(layer, domains, num_ranks, row_times_W) >= target:
            enough = middle
        else:
            below = middle
    return enough


def frontier_times(
    domains: Mapping[str, np.ndarray],
    num_ranks: int,
    counts: Sequence[int],
    *,
    row_times_W: Sequence[float] | None = None,
    **options: Any,
) -> list[dict[str, tuple[float, float]]]:
    """Return, for each number of copies of a layer, each domain's ideal and slowest time in all.

    Args:
        domains: int64 [S, E] loads of each domain of traffic.
        num_ranks: W.
        counts: of copies, ascending.
        row_times_W: time per row of each rank.
        options: of `frontier`.
    """
    return [
        {
            name: (
                float(mean_times(loads_SE, num_ranks, row_times_W).sum()),
                float(slowest_times(layer, loads_SE, num_ranks, row_times_W).sum()),
            )
            for name, loads_SE in domains.items()
        }
        for layer in frontier(domains, num_ranks, counts, row_times_W=row_times_W, **options)
    ]


def doubling(most: int) -> list[int]:
    """Return 0, 1, 2, 4, ... up to a number, which ends the list."""
    counts = [0]
    step = 1
    while step < most:
        counts.append(step)
        step *= 2
    return [*counts, most] if most else counts


def worst_share(
    layer: LayerPlacement,
    domains: Mapping[str, np.ndarray],
    num_ranks: int,
    row_times_W: Sequence[float] | None = None,
) -> float:
    """Return the least share of the domains, and of all mixed."""
    parts = [*domains.values()]
    if len(parts) > 1:
        parts.append(np.rint(mixed_steps(domains)).astype(np.int64))
    return min(predicted_share(layer, loads_SE, num_ranks, row_times_W) for loads_SE in parts)
