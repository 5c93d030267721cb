"""Rules of the config that depend on the number of ranks and on the model; pure.

`config.py` checks what it can see by itself; these are asked once the launch and the checkpoint are
known. Every rank gets the same answer without communication.
"""

from __future__ import annotations

from engine.config import CapacityConfig, Config
from engine.config_check import ConfigError


def validate_world(config: Config, world_size: int, num_experts: int | None = None) -> None:
    """Check the settings that depend on the number of ranks and, when known, of experts.

    Raises `ConfigError`. Pure: every rank gets the same answer without communication.
    """
    parallel = config.parallel
    expert = world_size if parallel.expert is None else parallel.expert
    written = "null (all ranks)" if parallel.expert is None else str(expert)
    problems = []
    if world_size % expert:
        problems.append(
            f"parallel.expert = {written}: must divide the number of ranks, {world_size}; start "
            f"a multiple of {expert} ranks, or pass --set parallel.expert=null to use all ranks"
        )
    if expert % parallel.tensor:
        problems.append(
            f"parallel.tensor = {parallel.tensor}: must divide the expert-parallel size, {expert}"
        )
    if num_experts is not None and expert > num_experts:
        problems.append(
            f"parallel.expert = {written}: must be at most the model's number of experts, "
            f"{num_experts}, but would be {expert}; more ranks than that run as replicas, e.g. "
            f"--set parallel.expert={num_experts}"
        )
    if problems:
        raise ConfigError(*problems)


def validate_capacity(
    config: CapacityConfig, *, num_experts: int, top_k: int, expert_ranks: int
) -> None:
    """Check the capacity settings that depend on the model and on how its experts are spread.

    Raises `ConfigError`. Pure: every rank gets the same answer without communication.
    """
    if config.policy != "expanded_drop":
        return
    most_local = -(-num_experts // expert_ranks)
    problems = []
    if config.expand is not None and config.expand > most_local:
        problems.append(
            f"moe.capacity.expand = {config.expand}: must be at most {most_local}, the experts "
            f"of one rank ({num_experts} experts on {expert_ranks} ranks); null means all of them"
        )
    if top_k == num_experts:
        problems.append(
            f"moe.capacity.policy = 'expanded_drop': has nothing to add, because every token "
            f"already chooses all {num_experts} experts of this model; use token_drop"
        )
    if problems:
        raise ConfigError(*problems)
