"""Layer search: where one layer's homes and copies should be, for recorded loads.

Homes start as they are or, where they may move, from a balanced packing; copies are added, each an
expert of a loaded rank on a rank with little to do; `anneal.py` then moves copies and exchanges
homes. What is minimised is the mean over all recorded steps, plus 0.3 times the worst, of the
slowest rank's time after the split (`candidate.py`). Steps are kept apart: experts that are hot
together go to different ranks, which mean loads would not show. With several domains of traffic the
steps are those of each alone and of all mixed, so that a plan is good for all.

Equal arguments give equal placements.

Legend: S steps, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from random import Random

import numpy as np

from engine.moe.placement.anneal import HOT, SMALL, Moves, add_copy, anneal
from engine.moe.placement.candidate import Candidate
from engine.moe.placement.placement import LayerPlacement
from engine.moe.placement.problem import MARGIN, Problem, make_problem

_TRIES = 24  # ranks and experts that are tried for a further copy
_IMPROVE_TRIES = 400
_SETTLE = 64  # sweeps of the relaxation, to compare placements
_PHASES = 10  # of annealing, each with other imagined steps
# A small layer is planned several times over, from these temperatures: a search of it costs little,
# and ends in one of a few places, not always the best.
_HEATS = (HOT, 10 * HOT, 30 * HOT) * 2


def plan_layer(
    domains: Mapping[str, np.ndarray],
    num_ranks: int,
    *,
    num_copies: int,
    seed: int = 0,
    row_times_W: Sequence[float] | None = None,
    keep_homes: bool = False,
    nodes: int | None = None,
    node_cost: float = 0.0,
    start: LayerPlacement | None = None,
    slots_W: Sequence[int] | None = None,
    effort: float = 1.0,
    margin: float = MARGIN,
) -> LayerPlacement:
    """Return homes and copies of one layer.

    Args:
        domains: int64 [S, E] loads of each domain of traffic.
        num_ranks: W.
        num_copies: of the layer; fewer where no rank may hold a further one.
        seed: of the search.
        row_times_W: time per row of each rank; None: ranks are equal.
        keep_homes: homes stay contiguous, or those of `start`.
        nodes: the ranks, in order, are spread over so many nodes.
        node_cost: of a row that leaves its node, in rows of the slowest rank.
        start: whose homes are the first; None: contiguous ones or a balanced packing.
        slots_W: most copies of each rank; None: as equal as can be.
        effort: of the search; 2.0 takes twice as long.
        margin: see `problem.make_problem`.

    Raises:
        ValueError: there are more ranks than experts, or no loads.
    """
    if slots_W is None:
        slots_W = (-(-num_copies // num_ranks),) * num_ranks
    pose = partial(make_problem, domains, num_ranks, slots_W, row_times_W, nodes, node_cost, margin)
    problem = pose()
    phases = _PHASES if problem.num_imagined else 1
    rounds = int(effort * rounds_of(problem, num_copies, keep_homes)) // phases
    is_small = problem.num_experts * num_ranks <= SMALL and num_copies
    found: list[LayerPlacement] = []
    for number, hot in enumerate(_HEATS if is_small else _HEATS[:1]):
        draw = Random(seed + 1_000_003 * number)
        candidate = first_candidate(problem, keep_homes=keep_homes, start=start)
        for _ in range(num_copies):
            candidate = add_copy(candidate, _TRIES, draw)
        layer = candidate.layer()
        for phase in range(phases):
            candidate = Candidate(pose(imagined=phase), layer)
            layer = anneal(candidate, rounds, draw, homes=not keep_homes, hot=hot).layer()
        found.append(layer)
    if len(found) == 1:
        return found[0]
    return min(found, key=lambda each: Candidate(problem, each).cost(_SETTLE))


def frontier(
    domains: Mapping[str, np.ndarray],
    num_ranks: int,
    counts: Sequence[int],
    *,
    seed: int = 0,
    row_times_W: Sequence[float] | None = None,
    keep_homes: bool = False,
    nodes: int | None = None,
    node_cost: float = 0.0,
    effort: float = 0.1,
    margin: float = MARGIN,
) -> Iterator[LayerPlacement]:
    """Yield a placement for each of these numbers of copies, which ascend.

    Every one is made from the one before it, so that the whole costs little more than the last.

    Args:
        domains: as in `plan_layer`, like all others.
        num_ranks: W.
        counts: of copies.
        seed: of the search.
        row_times_W: time per row of each rank.
        keep_homes: homes stay contiguous.
        nodes: of the ranks.
        node_cost: of a row that leaves its node.
        effort: of the search for each.
        margin: see `problem.make_problem`.
    """
    draw = Random(seed)
    layer: LayerPlacement | None = None
    for count in counts:
        slots_W = (-(-count // num_ranks),) * num_ranks
        problem = make_problem(domains, num_ranks, slots_W, row_times_W, nodes, node_cost, margin)
        if layer is None:
            candidate = first_candidate(problem, keep_homes=keep_homes)
        else:
            candidate = Candidate(problem, layer)
        while len(candidate.copies_C2) < count:
            longer = add_copy(candidate, _TRIES, draw)
            if longer is candidate:
                break
            candidate = longer
        rounds = int(effort * rounds_of(problem, count, keep_homes))
        layer = anneal(candidate, rounds, draw, homes=not keep_homes).layer()
        yield layer


def improve_layer(
    layer: LayerPlacement,
    loads_SE: np.ndarray,
    num_ranks: int,
    *,
    max_moves: int,
    seed: int = 0,
    row_times_W: Sequence[float] | None = None,
) -> LayerPlacement:
    """Return the placement with a few copies replaced, for loads that have changed.

    Args and errors are those of `improvements`, of which this is the last.
    """
    found = improvements(
        layer, loads_SE, num_ranks, max_moves=max_moves, seed=seed, row_times_W=row_times_W
    )
    return found[-1] if found else layer


def improvements(
    layer: LayerPlacement,
    loads_SE: np.ndarray,
    num_ranks: int,
    *,
    max_moves: int,
    seed: int = 0,
    row_times_W: Sequence[float] | None = None,
) -> list[LayerPlacement]:
    """Return the placement with one copy replaced, with two, and so on, while that helps.

    For loads that have changed. Homes stay, and every rank holds as many copies as before: a move
    gives one rank one other expert. Each move is the best of those tried.

    Args:
        layer: the placement so far.
        loads_SE: int64, rows of every expert in each of the steps to plan for.
        num_ranks: W.
        max_moves: most copies that are replaced.
        seed: of what is tried.
        row_times_W: time per row of each rank.

    Raises:
        ValueError: there are no loads.
    """
    held = [rank for ranks in layer.copies_E for rank in ranks]
    slots_W = np.bincount(held, minlength=num_ranks).tolist()
    problem = make_problem({"": loads_SE}, num_ranks, slots_W, row_times_W, margin=0.0)
    candidate, draw = Candidate(problem, layer), Random(seed)
    cost = candidate.cost(_SETTLE)
    replaced: set[tuple[int, int]] = set()
    found: list[LayerPlacement] = []
    for _ in range(min(max_moves, len(held))):
        best = _best_replacement(candidate, replaced, draw)
        if best is None or best[0] >= cost - 1e-4:
            break
        number = best[1][0]
        candidate.move_copy(*best[1])
        cost = candidate.cost(_SETTLE)
        replaced.add((number, int(candidate.copies_C2[number, 1])))
        found.append(candidate.layer())
    return found


def first_candidate(
    problem: Problem, *, keep_homes: bool, start: LayerPlacement | None = None
) -> Candidate:
    """Return a candidate without copies, or `start`'s homes and copies."""
    if start is not None:
        return Candidate(problem, start)
    contiguous = LayerPlacement.contiguous(problem.num_experts, problem.num_ranks)
    return Candidate(problem, contiguous if keep_homes else balanced_homes(problem, contiguous))


def balanced_homes(problem: Problem, contiguous: LayerPlacement) -> LayerPlacement:
    """Return homes by a balanced packing: as many on each rank as contiguous ones would be.

    The expert with most rows of those left goes to the rank that would finish first.
    """
    free_W = np.bincount(contiguous.home_E, minlength=problem.num_ranks)
    load_W = np.zeros(problem.num_ranks)
    mean_E = problem.loads_ES.mean(1, dtype=np.float64)
    home_E = np.empty(problem.num_experts, dtype=np.int64)
    for expert in np.argsort(-mean_E, kind="stable").tolist():
        times_W = np.where(free_W > 0, (load_W + mean_E[expert]) * problem.times_W, np.inf)
        rank = int(times_W.argmin())
        home_E[expert] = rank
        free_W[rank] -= 1
        load_W[rank] += mean_E[expert]
    return LayerPlacement(tuple(home_E.tolist()), ((),) * problem.num_experts)


def rounds_of(problem: Problem, num_copies: int, keep_homes: bool) -> int:
    """Return the rounds of annealing that a layer is worth: more for more that can be changed."""
    if not num_copies and keep_homes:
        return 0
    return min(50_000, 1_000 + 12 * (num_copies + 1) * problem.num_ranks)


def _best_replacement(
    candidate: Candidate, replaced: set[tuple[int, int]], draw: Random
) -> tuple[float, tuple[int, int, int]] | None:
    """Return the best of the replacements tried: its cost, and copy, expert and rank."""
    copies = candidate.copies_C2.tolist()
    hosts = [{home} for home in candidate.home_E.tolist()]
    for expert, rank in copies:
        hosts[expert].add(rank)
    every = [
        (number, expert, rank)
        for number, (_, rank) in enumerate(copies)
        if (number, rank) not in replaced
        for expert in range(len(hosts))
        if rank not in hosts[expert]
    ]
    if len(every) > _IMPROVE_TRIES:
        moves = Moves(candidate, draw, homes=False)
        guided = {moves.hot_and_cold() for _ in range(_IMPROVE_TRIES)}
        every = [each for each in every if each[1:] in guided]
    other, best = candidate.twin(), None
    for each in every:
        other.take(candidate)
        other.move_copy(*each)
        found = other.cost(12)
        if best is None or found < best[0]:
            best = found, each
    return best
