"""Homes and copies of experts, drawn at random."""

import numpy as np

from engine.ops.expert_hosts import Hosts


def random_hosts(rng: np.random.Generator, num_ranks: int, num_experts: int, copies: int) -> Hosts:
    """Place homes anywhere, and up to `copies` copies on ranks that do not hold the expert."""
    held = [[int(rng.integers(num_ranks))] for _ in range(num_experts)]
    for expert in rng.integers(num_experts, size=copies).tolist():
        free = [rank for rank in range(num_ranks) if rank not in held[expert]]
        if free:
            held[expert].append(int(rng.choice(free)))
    instances = [
        (expert, rank, number == 0)
        for expert, ranks in enumerate(held)
        for number, rank in enumerate(ranks)
    ]
    # Rank by rank, in a rank homes first: as the engine numbers instances.
    instances.sort(key=lambda instance: (instance[1], not instance[2], instance[0]))
    expert_I, rank_I, home_I = (np.array(column) for column in zip(*instances, strict=True))
    return Hosts(num_ranks, expert_I, rank_I, home_I)
