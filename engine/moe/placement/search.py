"""Search: a placement for a whole model, layer by layer, and what it promises.

`layer_search.py` plans one layer; here layers are planned side by side, the ranks of each are named
so that all hold about as many copies, and the shares that are to be expected are worked out for
each domain of traffic. `budget.py` finds how many copies each layer is worth.

Legend: S steps, E experts, L layers, W ranks.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from engine.moe.placement.layer_search import frontier, improve_layer, plan_layer
from engine.moe.placement.placement import LayerPlacement, Placement, PlannedLoads, Precision
from engine.moe.placement.predict import (
    mean_times,
    predicted_share,
    share,
    slowest_times,
)
from engine.moe.placement.problem import MARGIN, mixed_steps

__all__ = [
    "Loads",
    "describe",
    "frontier",
    "improve",
    "improve_layer",
    "map_layers",
    "plan",
    "plan_layer",
    "predicted_share",
]

MIXED = "mixed"  # the name of the steps of all domains together
Loads = Mapping[str, Mapping[int, np.ndarray]]  # domain -> layer -> int64 [S, E]
_R = TypeVar("_R")


def plan(
    domains: Loads,
    num_experts: int,
    num_ranks: int,
    *,
    num_copies: int | Mapping[int, int],
    precision: Precision = "model",
    seed: int = 0,
    row_times_W: Sequence[float] | None = None,
    keep_homes: bool = False,
    nodes: int | None = None,
    node_cost: float = 0.0,
    slots: Mapping[int, Sequence[int]] | None = None,
    fingerprint: str | None = None,
    processes: int = 1,
    effort: float = 1.0,
    margin: float = MARGIN,
) -> Placement:
    """Return a placement of every layer that has loads, with the shares to be expected.

    Args:
        domains: the recorded loads; every domain has the same layers.
        num_experts: E.
        num_ranks: W.
        num_copies: of each layer, or by layer.
        precision: of the copies.
        seed: of the search.
        row_times_W: time per row of each rank; None: ranks are equal.
        keep_homes: homes stay contiguous.
        nodes: the ranks, in order, are spread over so many nodes.
        node_cost: of a row that leaves its node, in rows of the slowest rank.
        slots: by layer, the most copies of each rank; None: as equal as can be.
        fingerprint: of the model.
        processes: that plan layers side by side.
        effort: of the search; 2.0 takes twice as long.
        margin: see `problem.make_problem`.

    Raises:
        ValueError: there are more ranks than experts, or no loads.
    """
    layers = layers_of(domains)
    tasks = [
        partial(
            plan_layer,
            {name: loads[index] for name, loads in domains.items()},
            num_ranks,
            num_copies=num_copies if isinstance(num_copies, int) else num_copies[index],
            seed=seed + index,
            row_times_W=row_times_W,
            keep_homes=keep_homes,
            nodes=nodes,
            node_cost=node_cost,
            slots_W=None if slots is None else slots[index],
            effort=effort,
            margin=margin,
        )
        for index in layers
    ]
    planned = dict(zip(layers, map_layers(tasks, processes), strict=True))
    ranks_are_alike = not keep_homes and row_times_W is None and (nodes or 1) == 1
    if ranks_are_alike and slots is None:
        planned = with_even_copies(planned, num_ranks)
    placement = Placement(
        num_ranks=num_ranks,
        num_experts=num_experts,
        layers=planned,
        precision=precision,
        fingerprint=fingerprint,
        row_times_W=() if row_times_W is None else tuple(row_times_W),
    )
    return describe(placement, domains)


def improve(
    placement: Placement, domains: Loads, *, max_moves: int, seed: int = 0, processes: int = 1
) -> Placement:
    """Return a placement with a few copies of each layer replaced, for loads that have changed.

    Args:
        placement: so far.
        domains: the recorded loads; of several, their mixed steps count.
        max_moves: most copies that are replaced per layer.
        seed: of the search.
        processes: that work side by side.
    """
    layers = layers_of(domains)
    times_W = placement.row_times_W or None
    tasks = [
        partial(
            improve_layer,
            placement.layer(index),
            _mixed_or_only({name: loads[index] for name, loads in domains.items()}),
            placement.num_ranks,
            max_moves=max_moves,
            seed=seed + index,
            row_times_W=times_W,
        )
        for index in layers
    ]
    improved = dict(zip(layers, map_layers(tasks, processes), strict=True))
    return describe(replace(placement, layers={**placement.layers, **improved}), domains)


def describe(placement: Placement, domains: Loads) -> Placement:
    """Return a placement with what it promises for each domain, and for all mixed if several."""
    times_W = placement.row_times_W or None
    described: dict[str, PlannedLoads] = {}
    for name, loads in with_mixed(domains).items():
        means, slowest = [], []
        shares: dict[int, float] = {}
        for index, loads_SE in loads.items():
            means.append(mean_times(loads_SE, placement.num_ranks, times_W))
            layer = placement.layer(index)
            slowest.append(slowest_times(layer, loads_SE, placement.num_ranks, times_W))
            shares[index] = share(means[-1], slowest[-1])
        described[name] = PlannedLoads(
            share(np.concatenate(means), np.concatenate(slowest)),
            shares,
            {i: tuple(np.rint(x.mean(0)).astype(int).tolist()) for i, x in loads.items()},
        )
    return replace(placement, domains=described)


def with_mixed(domains: Loads) -> dict[str, Mapping[int, np.ndarray]]:
    """Return the domains and, where there are several, their mixed steps, in whole rows."""
    found = dict(domains)
    if len(domains) > 1:
        found[MIXED] = {
            index: _mixed_or_only({name: loads[index] for name, loads in domains.items()})
            for index in layers_of(domains)
        }
    return found


def layers_of(domains: Loads) -> list[int]:
    """Return the layers that have loads, ascending.

    Raises:
        ValueError: there are no domains, or their layers differ.
    """
    found = [sorted(loads) for loads in domains.values()]
    if not found or not found[0]:
        raise ValueError("domains: loads of at least one layer of one domain are needed")
    for name, layers in zip(domains, found, strict=True):
        if layers != found[0]:
            raise ValueError(
                f"domain {name!r} has the layers {layers}, another {found[0]}: the traces must be "
                "of one model"
            )
    return found[0]


def map_layers(tasks: Sequence[Callable[[], _R]], processes: int = 1) -> Iterator[_R]:
    """Yield the results of tasks in order, from so many processes side by side."""
    if processes <= 1 or len(tasks) <= 1:
        for task in tasks:
            yield task()
        return
    # Not by fork: the threads of torch, and of a running job, do not survive it.
    context = multiprocessing.get_context("spawn")
    processes = min(processes, len(tasks))
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        for running in [pool.submit(task) for task in tasks]:
            yield running.result()


def with_even_copies(
    layers: Mapping[int, LayerPlacement], num_ranks: int
) -> dict[int, LayerPlacement]:
    """Return the layers with ranks renamed, so that all ranks hold about as many copies in all.

    Only where all ranks are alike: of every layer, the rank with most copies becomes the one that
    holds fewest so far.
    """
    held_W = np.zeros(num_ranks, dtype=np.int64)
    renamed: dict[int, LayerPlacement] = {}
    for index, layer in layers.items():
        on_rank = [rank for ranks in layer.copies_E for rank in ranks]
        count_W = np.bincount(on_rank, minlength=num_ranks)
        homes_W = np.bincount(layer.home_E, minlength=num_ranks)
        name_W = np.arange(num_ranks)
        for count in np.unique(homes_W):  # ranks keep their numbers of homes
            alike = np.flatnonzero(homes_W == count)
            most = alike[np.argsort(-count_W[alike], kind="stable")]
            fewest = alike[np.argsort(held_W[alike], kind="stable")]
            if len(set(count_W[alike].tolist())) > 1:
                name_W[most] = fewest
        held_W[name_W] += count_W
        name = name_W.tolist()
        renamed[index] = LayerPlacement(
            tuple(name[rank] for rank in layer.home_E),
            tuple(tuple(sorted(name[rank] for rank in ranks)) for ranks in layer.copies_E),
        )
    return renamed


def _mixed_or_only(domains: Mapping[str, np.ndarray]) -> np.ndarray:
    if len(domains) == 1:
        return next(iter(domains.values()))
    return np.rint(mixed_steps(domains)).astype(np.int64)
