"""The ranks that hold each expert, in the form that split.py and the compiled library read.

Legend: E experts, W ranks, I instances (an expert on a rank).
"""

from __future__ import annotations

import numpy as np
import torch


class Hosts:
    """The ranks that hold each expert of a layer: prepared once, used every step."""

    def __init__(
        self, num_ranks: int, expert_I: np.ndarray, rank_I: np.ndarray, home_I: np.ndarray
    ) -> None:
        """Check the instances and arrange them by expert, homes first.

        Args:
            num_ranks: W.
            expert_I: int64, the expert of each instance; experts are numbered from 0 without gaps.
            rank_I: int64, its rank.
            home_I: bool, whether it is the expert's home.

        Raises:
            ValueError: an expert without a home or with two, a rank out of range, or two instances
                of an expert on one rank.
        """
        expert_I = np.asarray(expert_I, dtype=np.int64)
        rank_I = np.asarray(rank_I, dtype=np.int64)
        home_I = np.asarray(home_I, dtype=bool)
        self.num_ranks, self.num_instances = int(num_ranks), len(expert_I)
        self.num_experts = int(expert_I.max()) + 1 if len(expert_I) else 0
        self.expert_I, self.rank_I, self.home_I = expert_I, rank_I, home_I
        _check(self)
        place_I = np.lexsort((rank_I, ~home_I, expert_I))
        counts_E = np.bincount(expert_I, minlength=self.num_experts)
        start_E1 = np.concatenate(([0], np.cumsum(counts_E)))
        sorted_expert_I, sorted_rank_I = expert_I[place_I], rank_I[place_I]
        several_I = np.flatnonzero(counts_E[sorted_expert_I] > 1)
        by_rank = several_I[np.argsort(sorted_rank_I[several_I], kind="stable")]
        per_rank_W = np.bincount(sorted_rank_I[several_I], minlength=num_ranks)
        sizes = (self.num_ranks, self.num_experts, self.num_instances)
        parts = (
            sizes,
            start_E1,
            sorted_rank_I,
            sorted_expert_I,
            place_I,
            [0],
            np.cumsum(per_rank_W),
            by_rank,
        )
        self.packed = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        self.start_E1, self.sorted_rank_I, self.place_I = start_E1, sorted_rank_I, place_I

    def without(self, closed_I: np.ndarray) -> Hosts:
        """Return the hosts without the instances marked in closed_I (bool, no homes)."""
        open_I = ~closed_I
        return Hosts(
            self.num_ranks, self.expert_I[open_I], self.rank_I[open_I], self.home_I[open_I]
        )


def _check(hosts: Hosts) -> None:
    if not len(hosts.expert_I) == len(hosts.rank_I) == len(hosts.home_I):
        raise ValueError("expert_I, rank_I and home_I must have one entry per instance")
    outside = (hosts.rank_I < 0) | (hosts.rank_I >= hosts.num_ranks)
    if outside.any():
        rank = hosts.rank_I[outside][0]
        raise ValueError(
            f"an instance is on rank {rank}: there are ranks 0 to {hosts.num_ranks - 1}"
        )
    homes_E = np.bincount(hosts.expert_I[hosts.home_I], minlength=hosts.num_experts)
    if (homes_E != 1).any():
        expert = int(np.flatnonzero(homes_E != 1)[0])
        raise ValueError(f"expert {expert} has {homes_E[expert]} homes: it must have one")
    pairs = hosts.expert_I * hosts.num_ranks + hosts.rank_I
    unique, counts = np.unique(pairs, return_counts=True)
    if (counts > 1).any():
        expert, rank = divmod(int(unique[counts > 1][0]), hosts.num_ranks)
        raise ValueError(f"expert {expert} is more than once on rank {rank}")
