"""Level the loads of ranks over the copies of experts: the inner loop of the search for placements.

Rows of an expert move between two of its hosts until both finish at the same time, or until one of
them has no more; a sweep goes through all such pairs once. Repeated sweeps converge to the split
whose most loaded rank is least, for every step alike. It is a relaxation in float32; what a job
computes with is the exact split in integers.

Legend: S steps, E experts, C copies, W ranks, I instances: the E homes, then the C copies.
"""

import torch

from engine.ops import native


def level_rows(
    load_WS: torch.Tensor,
    rows_IS: torch.Tensor,
    home_E: torch.Tensor,
    copies_C2: torch.Tensor,
    times_W: torch.Tensor,
    sweeps: int,
) -> torch.Tensor:
    """Move rows between hosts in place; return the time of the slowest rank of every step.

    Args:
        load_WS: float32, rows of every rank; changed in place.
        rows_IS: float32, rows of every instance, which add up to load_WS; changed in place.
        home_E: int64, the rank of each expert's home.
        copies_C2: int64, expert and rank of each copy.
        times_W: float32, time per row of each rank.
        sweeps: how often to go through all pairs of hosts.
    """
    if native.available():
        return torch.ops.lockstep_cpu.level_rows(
            load_WS, rows_IS, home_E, copies_C2, times_W, sweeps
        )
    return level_rows_reference(load_WS, rows_IS, home_E, copies_C2, times_W, sweeps)


def level_rows_reference(
    load_WS: torch.Tensor,
    rows_IS: torch.Tensor,
    home_E: torch.Tensor,
    copies_C2: torch.Tensor,
    times_W: torch.Tensor,
    sweeps: int,
) -> torch.Tensor:
    """Plain torch form of `level_rows`."""
    homes, copies = home_E.tolist(), copies_C2.tolist()
    num_experts = len(homes)
    pairs: list[tuple[int, int, int, int]] = []  # two instances, then their ranks
    for number, (expert, rank) in enumerate(copies):
        pairs.append((expert, num_experts + number, homes[expert], rank))
        for other, (same, further) in enumerate(copies[:number]):
            if same == expert:
                pairs.append((num_experts + other, num_experts + number, further, rank))
    weights = [
        tuple(times_W[rank] / (times_W[a] + times_W[b]) for rank in (a, b)) for _, _, a, b in pairs
    ]
    for sweep in range(sweeps):
        order = range(len(pairs)) if sweep % 2 == 0 else range(len(pairs) - 1, -1, -1)
        for index in order:
            first, second, a, b = pairs[index]
            weight_a, weight_b = weights[index]
            moved_S = weight_a * load_WS[a] - weight_b * load_WS[b]
            moved_S = torch.minimum(torch.maximum(moved_S, -rows_IS[second]), rows_IS[first])
            load_WS[a] -= moved_S
            load_WS[b] += moved_S
            rows_IS[first] -= moved_S
            rows_IS[second] += moved_S
    return (load_WS * times_W[:, None]).amax(0)
