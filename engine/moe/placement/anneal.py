"""Anneal: improve a candidate placement by moves of copies and swaps of homes.

A move is guided by a recorded step in which ranks are far apart: an expert of one of its most
loaded ranks gets a copy on, or exchanges its home with an expert of, a rank with little to do. What
makes the cost less is kept; what makes it a little more, sometimes, and less and less often.

Legend: S steps, E experts, C copies, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import numpy as np

from engine.moe.placement.candidate import Candidate

_SWEEPS = 8  # after a change
_SETTLE = 32  # after a change that is kept
HOT, _COLD = 3e-3, 2e-5  # temperature at the start and at the end, in the mean rank's rows
SMALL = 512  # experts times ranks of a layer whose changes are few
_TIED = 0.995  # of the most loaded rank: ranks whose rows no copy could move away

Change = Callable[[Candidate], None]


class Moves:
    """Draws changes of one candidate."""

    def __init__(
        self, candidate: Candidate, draw: Random, *, homes: bool, swaps: bool = True
    ) -> None:
        self._homes, self._swaps, self._draw = homes, swaps, draw
        # Where few changes are possible, some are drawn without guidance: a better place may be
        # behind one that helps no loaded rank.
        problem = candidate.problem
        self._anywhere = problem.num_experts * problem.num_ranks <= SMALL
        self.follow(candidate)

    def follow(self, candidate: Candidate) -> None:
        """Draw changes of this one from now on."""
        self._candidate = candidate
        self._copies = [(int(e), int(rank)) for e, rank in candidate.copies_C2.tolist()]
        self._home = candidate.home_E.tolist()
        num_ranks = candidate.problem.num_ranks
        self._on: list[list[int]] = [[] for _ in range(num_ranks)]  # copies by rank
        self._hosts = [{home} for home in self._home]
        for number, (expert, rank) in enumerate(self._copies):
            self._on[rank].append(number)
            self._hosts[expert].add(rank)
        self._times_S = (candidate.load_WS * candidate.problem.times_W[:, None]).max(0)

    def draw(self) -> Change | None:
        """Return a change, or None where what was drawn is not allowed."""
        copies = len(self._copies)
        chance = self._draw.random()
        if self._homes and (not copies or chance < 0.35):
            return self._swap_homes()
        if not copies:
            return None
        if self._swaps and chance > 0.9:
            return self._swap_copies()
        found = self._any_pair() if self._anywhere and chance > 0.6 else self.hot_and_cold()
        return None if found is None else self._move_copy(*found)

    def _any_pair(self) -> tuple[int, int] | None:
        """Return any expert and any rank that does not hold it."""
        expert, rank = self._below(len(self._hosts)), self._below(len(self._on))
        return None if rank in self._hosts[expert] else (expert, rank)

    def hot_and_cold(self, among_W: np.ndarray | None = None) -> tuple[int, int] | None:
        """Return an expert of a loaded rank and a rank with little to do, in a drawn step.

        Args:
            among_W: bool, the ranks with little to do are of these; None: of all.
        """
        candidate = self._candidate
        step = self._pick(np.maximum(self._times_S - 0.9 * self._times_S.min(), 0))
        times_W = candidate.load_WS[:, step] * candidate.problem.times_W
        most = float(times_W.max())
        hot_W = np.flatnonzero(times_W >= _TIED * most).tolist()
        hot = hot_W[self._below(len(hot_W))]
        held = [e for e, hosts in enumerate(self._hosts) if hot in hosts]
        expert = held[self._pick(candidate.problem.loads_ES[held, step])]
        slack_W = most - times_W
        cold = self._pick(slack_W if among_W is None else slack_W * among_W)
        return None if cold in self._hosts[expert] else (expert, cold)

    def _move_copy(self, expert: int, rank: int) -> Change | None:
        """Take a copy away that is of little use and place one of the expert on the rank."""
        own = self._on[rank]
        if len(own) >= self._candidate.problem.slots_W[rank]:
            if not own:
                return None
            number = own[self._below(len(own))]
        else:
            drawn = [self._below(len(self._copies)) for _ in range(3)]
            first = self._candidate.problem.num_experts
            number = min(drawn, key=lambda n: float(self._candidate.rows_IS[first + n].sum()))
        return lambda candidate: candidate.move_copy(number, expert, rank)

    def _swap_copies(self) -> Change | None:
        """Exchange the ranks of two copies."""
        one, two = (self._below(len(self._copies)) for _ in range(2))
        (expert, rank), (other, place) = self._copies[one], self._copies[two]
        if place in self._hosts[expert] or rank in self._hosts[other]:
            return None

        def change(candidate: Candidate) -> None:
            candidate.move_copy(one, expert, place)
            candidate.move_copy(two, other, rank)

        return change

    def _swap_homes(self) -> Change | None:
        found = self.hot_and_cold()
        if found is None:
            return None
        first, rank = found
        home = self._home[first]
        others = [expert for expert, place in enumerate(self._home) if place == rank]
        second = others[self._below(len(others))]
        if home == rank:
            return None
        # A copy on the new home moves to the old one, which may have no slot for it.
        moved = (rank in self._hosts[first]) - (home in self._hosts[second])
        slots = self._candidate.problem.slots_W
        if len(self._on[home]) + moved > slots[home] or len(self._on[rank]) - moved > slots[rank]:
            return None
        return lambda candidate: candidate.swap_homes(first, second)

    def _below(self, count: int) -> int:
        return int(self._draw.random() * count)

    def _pick(self, weights: np.ndarray) -> int:
        """Return an index, drawn by weight."""
        sums = np.cumsum(weights, dtype=np.float64)
        if not sums[-1] > 0:
            return self._below(len(sums))
        return min(
            int(np.searchsorted(sums, self._draw.random() * sums[-1], "right")), len(sums) - 1
        )


def anneal(
    candidate: Candidate, rounds: int, draw: Random, *, homes: bool, hot: float = HOT
) -> Candidate:
    """Return the best candidate found in so many rounds.

    Args:
        candidate: where to start; not to be used afterwards.
        rounds: changes that are tried.
        draw: of changes, and of whether a worse one is kept.
        homes: whether homes may be exchanged too.
        hot: temperature at the start, in the mean rank's rows.
    """
    cost = candidate.cost(2 * _SETTLE)
    best, least = candidate.layer(), cost
    other = candidate.twin()
    moves = Moves(candidate, draw, homes=homes)
    for number in range(rounds):
        change = moves.draw()
        if change is None:
            continue
        other.take(candidate)
        change(other)
        found = other.cost(_SWEEPS)
        heat = hot * (_COLD / hot) ** (number / rounds)
        if found > cost and draw.random() >= math.exp((cost - found) / heat):
            continue
        candidate, other = other, candidate
        cost = candidate.cost(_SETTLE)
        moves.follow(candidate)
        if cost < least:
            best, least = candidate.layer(), cost
    return Candidate(candidate.problem, best)


def add_copy(candidate: Candidate, tries: int, draw: Random) -> Candidate:
    """Return the candidate with the best further copy of those tried; itself where none is allowed.

    Every try is an expert of a loaded rank on a rank with little to do and a free slot.
    """
    candidate.cost(_SETTLE)
    problem, moves = candidate.problem, Moves(candidate, draw, homes=False)
    used_W = np.bincount(candidate.copies_C2[:, 1], minlength=problem.num_ranks)
    free_W = used_W < np.array(problem.slots_W)
    found = {moves.hot_and_cold(free_W) for _ in range(tries)}
    pairs = sorted(pair for pair in found if pair is not None and free_W[pair[1]])
    if not pairs:
        pairs = _hottest_on_coldest(candidate, free_W)
    extended = [candidate.with_copy(*pair) for pair in pairs]
    return min(extended, key=lambda each: each.cost(_SWEEPS), default=candidate)


def _hottest_on_coldest(candidate: Candidate, free_W: np.ndarray) -> list[tuple[int, int]]:
    """Return the expert with most rows that a free rank may hold, on the least loaded such rank."""
    loads_E = candidate.problem.loads_ES.mean(1)
    times_W = candidate.load_WS.mean(1) * candidate.problem.times_W
    for rank in sorted(np.flatnonzero(free_W).tolist(), key=lambda r: (times_W[r], r)):
        on_rank = candidate.home_E == rank
        on_rank[candidate.copies_C2[candidate.copies_C2[:, 1] == rank, 0]] = True
        if not on_rank.all():
            return [(int(np.where(on_rank, -1.0, loads_E).argmax()), rank)]
    return []
