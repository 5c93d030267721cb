"""Scenario: one combination of what may be varied, and the checks of it.

Every "what if" option takes several values; each combination is a scenario, a line of the table.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.config import CapacityConfig, ParallelConfig
from engine.config.validation import field_problems
from engine.config.world_rules import expert_ranks, validate_capacity
from engine.moe.placement.placement import Precision

MOST_RANKS = 4096
DROPLESS = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One line of the table."""

    ranks: int
    expert_ranks: int  # of one replica
    gamma: str  # none: dropless
    copies: int  # per layer; -1: those of a placement file
    tokens: int | None  # per step over all ranks; None: as recorded
    ranks_per_node: int
    capacity: CapacityConfig
    precision: Precision = "model"  # of copies
    slower: Mapping[int, float]  # rank -> what its own work takes over the device's

    @property
    def replicas(self) -> int:
        """Groups of ranks that hold all experts, each with tokens of its own."""
        return self.ranks // self.expert_ranks


def scenarios(
    *,
    num_experts: int,
    top_k: int,
    ranks: Sequence[int],
    expert: int | None,
    gammas: Sequence[str],
    scope: Literal["expert", "rank"],
    consensus: Literal["global", "quota", "local"],
    copies: Sequence[int],
    precision: Precision,
    tokens: Sequence[int | None],
    ranks_per_node: Sequence[int],
    slower: Mapping[int, float],
) -> list[Scenario]:
    """Return every combination, checked by the engine's own rules.

    Args:
        num_experts, top_k: E and K of the loads.
        ranks: numbers of ranks.
        expert: parallel.expert; None: as auto, the fewest replicas with a rank per expert at most.
        gammas: capacity factors as written, or none.
        scope, consensus: moe.capacity.
        copies: per layer; -1: those of a placement file.
        precision: of copies.
        tokens: per step.
        ranks_per_node: ranks that one node's links connect.
        slower: rank -> slowness.

    Raises:
        ValueError: naming the option, its value and what to do.
    """
    found = []
    for number, gamma, many, count, node in itertools.product(
        ranks, gammas, copies, tokens, ranks_per_node
    ):
        if not 1 <= number <= MOST_RANKS:
            raise ValueError(f"--ranks {number}: must be 1 to {MOST_RANKS:,}")
        size = expert or expert_ranks(ParallelConfig(expert="auto"), number, num_experts)
        if size > num_experts or number % size:
            raise ValueError(
                f"--expert {size}: must divide --ranks {number} and be at most the model's "
                f"{num_experts} experts; more ranks than experts run as replicas"
            )
        if count is not None and count < number:
            raise ValueError(
                f"--tokens {count}: is less than one token per rank on {number} ranks; give more"
            )
        if many > 0 and many > num_experts * (size - 1):
            raise ValueError(
                f"--copies {many}: {num_experts} experts on {size} ranks have room for at most "
                f"{num_experts * (size - 1)} copies per layer"
            )
        if outside := [rank for rank in slower if rank >= number]:
            raise ValueError(f"--slower {outside[0]}:...: there are {number} ranks, from 0")
        capacity = _capacity(gamma, scope, consensus)
        validate_capacity(
            capacity,
            num_experts=num_experts,
            top_k=top_k,
            expert_ranks=size,
            has_copies=many != 0,
        )
        found.append(
            Scenario(
                ranks=number,
                expert_ranks=size,
                gamma=gamma,
                copies=many,
                tokens=count,
                ranks_per_node=node,
                capacity=capacity,
                precision=precision,
                slower=slower,
            )
        )
    return found


def _capacity(
    gamma: str,
    scope: Literal["expert", "rank"],
    consensus: Literal["global", "quota", "local"],
) -> CapacityConfig:
    if gamma == DROPLESS:
        return CapacityConfig()
    config = CapacityConfig(policy="token_drop", factor=gamma, scope=scope, consensus=consensus)
    if problems := list(field_problems(config, "moe.capacity.")):
        raise ValueError(f"--gamma {gamma}: {problems[0]}")
    return config
