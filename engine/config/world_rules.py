"""Rules of the config that depend on the number of ranks and on the model; pure.

`schema.py` checks what depends on the config alone; these rules apply once the launch and the
checkpoint are known. Every rank gets the same answer without communication.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.config import CapacityConfig, Config, ParallelConfig
from engine.config.validation import ConfigError


def expert_ranks(parallel: ParallelConfig, world_size: int, num_experts: int | None = None) -> int:
    """Return the expert-parallel size that `parallel.expert` means with this many ranks.

    auto is the fewest replicas, and so the largest size, with at most one rank per expert: 7 and 6
    ranks share 8 experts in one replica, 12 in two of 6, 11 in eleven of 1. Raises `ConfigError`
    where no size fits. Pure.
    """
    if parallel.expert is None:
        return world_size
    if parallel.expert != "auto":
        return parallel.expert
    most = world_size if num_experts is None else num_experts
    for replicas in range(1, world_size + 1):
        size, rest = divmod(world_size, replicas)
        if rest == 0 and size <= most and size % parallel.tensor == 0:
            return size
    raise ConfigError(
        f"parallel.expert = auto: with {world_size} ranks and parallel.tensor = {parallel.tensor} "
        f"no size fits a model of {most} experts; start a multiple of {parallel.tensor} ranks"
    )


def validate_world(config: Config, world_size: int, num_experts: int | None = None) -> None:
    """Check the settings that depend on the number of ranks and, when known, of experts.

    Raises `ConfigError`. Pure.
    """
    parallel = config.parallel
    expert = expert_ranks(parallel, world_size, num_experts)
    written = "null (all ranks)" if parallel.expert is None else str(expert)
    problems = []
    if world_size % expert:
        problems.append(
            f"parallel.expert = {written}: must divide the number of ranks, {world_size}; start "
            f"a multiple of {expert} ranks, or pass --set parallel.expert=auto to run on any "
            "number, as an elastic run needs after it has lost some"
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
    config: CapacityConfig,
    *,
    num_experts: int,
    top_k: int,
    expert_ranks: int,
    most_local: int | None = None,
    has_copies: bool = False,
    num_zero_experts: int = 0,
) -> None:
    """Check the capacity settings that depend on the model and how its experts are distributed.

    Args:
        most_local: experts and copies of the rank that has most; None: without a placement.
        has_copies: whether ranks hold copies of other ranks' experts.
        num_zero_experts: which a token may choose instead.

    Raises `ConfigError`. Pure.
    """
    problems = list(_copies_problems(config)) if has_copies else []
    if config.policy != "expanded_drop":
        if problems:
            raise ConfigError(*problems)
        return
    if most_local is None:
        most_local = -(-num_experts // expert_ranks)
    if config.expand is not None and config.expand > most_local:
        problems.append(
            f"moe.capacity.expand = {config.expand}: must be at most {most_local}, the experts "
            f"of one rank ({num_experts} experts on {expert_ranks} ranks); null means all of them"
        )
    if top_k == num_experts and not num_zero_experts:
        problems.append(
            f"moe.capacity.policy = 'expanded_drop': has nothing to add, because every token "
            f"already chooses all {num_experts} experts of this model; use token_drop"
        )
    if problems:
        raise ConfigError(*problems)


def _copies_problems(config: CapacityConfig) -> Iterator[str]:
    """Yield what a capacity policy cannot do where experts have copies."""
    if config.policy == "none":
        return
    if config.consensus != "global":
        yield (
            f"moe.capacity.consensus = {config.consensus!r}: must be global where moe.placement "
            "has copies, because only all ranks' claims together say which rows a copy takes"
        )
    if config.selection == "radix":
        yield (
            "moe.capacity.selection = 'radix': must be auto or gather where moe.placement has "
            "copies, because histograms do not say which rows a copy takes"
        )
    if config.policy == "expanded_drop" and config.tiers == "one":
        yield (
            "moe.capacity.tiers = 'one': must be two where moe.placement has copies: extras fill "
            "the slots that are free after the rows are split"
        )
    if config.policy == "expanded_drop" and config.scope == "expert":
        yield (
            "moe.capacity.scope = 'expert': must be rank for expanded_drop where moe.placement has "
            "copies: free slots are those of a rank"
        )
