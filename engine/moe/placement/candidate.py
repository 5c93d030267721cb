"""Candidate: a placement in the search, with its rows already split over all recorded steps.

Rows of all steps are kept beside the placement, so that after a small change the split is found in
a few sweeps of `kernels/level_rows.py` instead of from the beginning.

Legend: S steps, E experts, C copies, W ranks, I instances: the E homes, then the C copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.moe.placement.placement import LayerPlacement
from engine.moe.placement.problem import Problem
from engine.ops.level_rows import level_rows


class Candidate:
    """Homes and copies as arrays, and the rows of each instance in every step."""

    def __init__(self, problem: Problem, layer: LayerPlacement) -> None:
        copies = [(e, rank) for e, ranks in enumerate(layer.copies_E) for rank in ranks]
        self._hold(problem, np.array(layer.home_E, dtype=np.int64), copies)
        self.load_WS[:] = 0
        np.add.at(self.load_WS, self.home_E, problem.loads_ES)
        self.rows_IS[: problem.num_experts] = problem.loads_ES
        self.rows_IS[problem.num_experts :] = 0

    def _hold(self, problem: Problem, home_E: np.ndarray, copies: Sequence[Sequence[int]]) -> None:
        steps = problem.loads_ES.shape[1]
        self.problem = problem
        self.home_E = home_E.copy()
        self.copies_C2 = np.array(copies, dtype=np.int64).reshape(-1, 2)
        self.load_WS = np.empty((problem.num_ranks, steps), dtype=np.float32)
        self.rows_IS = np.empty((problem.num_experts + len(copies), steps), dtype=np.float32)
        self._own = (
            torch.from_numpy(self.load_WS),
            torch.from_numpy(self.rows_IS),
            torch.from_numpy(self.home_E),
            torch.from_numpy(self.copies_C2),
        )
        self._times_W = torch.from_numpy(problem.times_W)

    def twin(self) -> Candidate:
        """Return an equal one with memory of its own."""
        other = object.__new__(Candidate)
        other._hold(self.problem, self.home_E, self.copies_C2.tolist())
        other.take(self)
        return other

    def with_copy(self, expert: int, rank: int) -> Candidate:
        """Return one with a further copy, which has no rows yet."""
        other = object.__new__(Candidate)
        copies = [*self.copies_C2.tolist(), [expert, rank]]
        other._hold(self.problem, self.home_E, copies)
        other.load_WS[:] = self.load_WS
        other.rows_IS[:-1] = self.rows_IS
        other.rows_IS[-1] = 0
        return other

    def take(self, other: Candidate) -> None:
        """Become equal to another with as many copies."""
        for own, new in zip(self._own, other._own, strict=True):
            own.copy_(new)

    def layer(self) -> LayerPlacement:
        """Return it as a placement."""
        copies: list[list[int]] = [[] for _ in range(self.problem.num_experts)]
        for expert, rank in self.copies_C2.tolist():
            copies[expert].append(rank)
        homes = tuple(self.home_E.tolist())
        return LayerPlacement(homes, tuple(tuple(sorted(ranks)) for ranks in copies))

    def cost(self, sweeps: int) -> float:
        """Level the loads with so many sweeps and return what the placement costs."""
        most_S = level_rows(*self._own, self._times_W, sweeps).numpy()
        problem = self.problem
        cost = float(most_S.mean(dtype=np.float64)) + problem.worst * float(most_S.max())
        if problem.node_W is not None and problem.node_cost:
            cost += problem.node_cost * self.rows_leaving()
        return cost

    def rows_leaving(self) -> float:
        """Return the rows that leave their node per step, in the mean rank's rows.

        Every node is taken to send as many of an expert's rows as any other, and to compute what it
        can of them itself.
        """
        problem = self.problem
        assert problem.node_W is not None
        num_nodes = int(problem.node_W.max()) + 1
        experts = np.concatenate([np.arange(problem.num_experts), self.copies_C2[:, 0]])
        ranks = np.concatenate([self.home_E, self.copies_C2[:, 1]])
        rows_NE = np.zeros((num_nodes, problem.num_experts))
        np.add.at(rows_NE, (problem.node_W[ranks], experts), self.rows_IS.mean(1))
        total_E = rows_NE.sum(0)
        return float((total_E - np.minimum(rows_NE, total_E / num_nodes).sum(0)).sum())

    def move_copy(self, number: int, expert: int, rank: int) -> None:
        """Make a copy that of another expert, or on another rank; its rows go home first."""
        before, source = self.copies_C2[number].tolist()
        moved_S = self.rows_IS[self.problem.num_experts + number]
        self.rows_IS[before] += moved_S
        self.load_WS[self.home_E[before]] += moved_S
        self.load_WS[source] -= moved_S
        moved_S[:] = 0
        self.copies_C2[number] = expert, rank

    def swap_homes(self, first: int, second: int) -> None:
        """Exchange the homes of two experts; a copy that was on the new home goes to the old one.

        Hosts of an expert then stay distinct.
        """
        num_experts = self.problem.num_experts
        ranks = {first: int(self.home_E[first]), second: int(self.home_E[second])}
        for expert, other in ((first, second), (second, first)):
            old, new = ranks[expert], ranks[other]
            on_new = (self.copies_C2[:, 0] == expert) & (self.copies_C2[:, 1] == new)
            if on_new.any():  # the hosts stay what they are: only the rows change their names
                number = int(on_new.argmax())
                both = [expert, num_experts + number]
                self.rows_IS[both] = self.rows_IS[both[::-1]]
                self.copies_C2[number, 1] = old
            else:
                self.load_WS[old] -= self.rows_IS[expert]
                self.load_WS[new] += self.rows_IS[expert]
            self.home_E[expert] = new
