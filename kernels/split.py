"""The exact split of experts' rows over the ranks that hold them, and the cut under limits.

An expert is held by its home and by the ranks with a copy. `split_rows` says how many of its rows
each computes, `cut` how many of its claims are kept where ranks have limits. Both decide in exact
integers from counts that all ranks hold, so that all ranks decide alike.

The ranks end at levels: `kernels/csrc/levels.h` finds them by flows that move rows off ranks above
a cap, `homes.h` then the split with the fewest rows away from home. Without the compiled library
`split_reference.py` gives the same integers, slowly.

Legend: E experts, W ranks, I instances (an expert on a rank), S steps, N claims.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.ops import native, split_reference
from engine.ops.expert_hosts import Hosts

_TRIES = 8  # splits more for least_block


def split_rows(
    load_E: np.ndarray,
    hosts: Hosts,
    *,
    speeds_W: np.ndarray | None = None,
    limit_W: np.ndarray | None = None,
    fewest_moved: bool = False,
    least_block: int = 0,
) -> np.ndarray:
    """Partition the rows of every expert among its hosts; return rows_I, int64.

    By default the most loaded rank gets as few rows as any split gives it; among such splits the
    loads are the least majorised (no row can move, also by way of other ranks, from a rank to one
    with at least two rows fewer); among those most rows stay at home; among those the lower ranks
    have the larger loads.

    Args:
        load_E: int64, the rows of each expert.
        hosts: who holds what.
        speeds_W: int64 above 0, relative speeds: the same for loads over speeds.
        limit_W: int64, the most rows of each rank. With `fewest_moved` required.
        fewest_moved: the fewest rows away from home that bring every rank within `limit_W`; where
            homes are within the limits nothing moves. Where no split is within them, each limit is
            raised to the rank's share at the optimum (of loads over speeds) without limits.
        least_block: a copy that would get fewer rows gets none where the most loaded rank (with
            `fewest_moved`: every limit) stays as it is without it; as many as a few tries find.

    Raises:
        ValueError: no split is within `limit_W` (without `fewest_moved`), `fewest_moved` without
            limits, or a speed below 1.
    """
    load_E = np.ascontiguousarray(load_E, dtype=np.int64)
    speeds_W = None if speeds_W is None else np.ascontiguousarray(speeds_W, dtype=np.int64)
    limit_W = None if limit_W is None else np.ascontiguousarray(limit_W, dtype=np.int64)
    if speeds_W is not None and (speeds_W < 1).any():
        raise ValueError(f"speeds_W={speeds_W.tolist()}: every speed must be at least 1")
    if fewest_moved and limit_W is None:
        raise ValueError("fewest_moved=True needs limit_W: without limits nothing has to move")
    rows_I = _split(load_E, hosts, speeds_W, limit_W, fewest_moved)
    if rows_I is None:
        limits = [] if limit_W is None else limit_W.tolist()
        raise ValueError(f"no split of {load_E.sum()} rows is within limit_W={limits}")
    if least_block > 1:
        return _without_small_blocks(
            rows_I, load_E, hosts, speeds_W, limit_W, fewest_moved, least_block
        )
    return rows_I


def optimum(load_E: np.ndarray, hosts: Hosts, speeds_W: np.ndarray | None = None) -> int:
    """Return the rows of the most loaded rank after the split of load_E (int64)."""
    if speeds_W is None:
        return int(batch_optimum(np.asarray(load_E)[None], hosts)[0])
    return int(rank_loads(split_rows(load_E, hosts, speeds_W=speeds_W), hosts).max())


def batch_optimum(loads_SE: np.ndarray, hosts: Hosts) -> np.ndarray:
    """Return the rows of the most loaded rank after the split of each step of loads_SE (int64)."""
    loads_SE = np.ascontiguousarray(loads_SE, dtype=np.int64)
    if native.available():
        found = torch.ops.lockstep_cpu.split_optimum(hosts.packed, torch.from_numpy(loads_SE))
        return found.numpy()
    return np.array([split_reference.optimum(load_E, hosts) for load_E in loads_SE], dtype=np.int64)


def cut(expert_N: np.ndarray, hosts: Hosts, limit_W: np.ndarray) -> np.ndarray:
    """Return how many claims of each expert are kept, the best ones of it: kept_E, int64.

    Goes through the claims in order and keeps those with which some split is still within limit_W.
    Once a claim of an expert does not fit, no later one of it does.

    Args:
        expert_N: int32 or int64, the expert of each claim, the claim to be kept first in front.
        hosts: who holds what.
        limit_W: int64, the most rows of each rank.
    """
    expert_N = np.ascontiguousarray(expert_N)
    limit_W = np.ascontiguousarray(limit_W, dtype=np.int64)
    if native.available():
        found = torch.ops.lockstep_cpu.cut(
            hosts.packed, torch.from_numpy(expert_N), torch.from_numpy(limit_W)
        )
        return found.numpy()
    return split_reference.cut(expert_N, hosts, limit_W)


def rank_loads(rows_I: np.ndarray, hosts: Hosts) -> np.ndarray:
    """Add up the rows of each rank's instances; return int64 [W]."""
    load_W = np.zeros(hosts.num_ranks, dtype=np.int64)
    np.add.at(load_W, hosts.rank_I, rows_I)
    return load_W


def _split(
    load_E: np.ndarray,
    hosts: Hosts,
    speeds_W: np.ndarray | None,
    limit_W: np.ndarray | None,
    fewest_moved: bool,
) -> np.ndarray | None:
    if not native.available():
        return split_reference.split_rows(load_E, hosts, speeds_W, limit_W, fewest_moved)
    rows_I = torch.ops.lockstep_cpu.split_rows(
        hosts.packed,
        torch.from_numpy(load_E),
        None if speeds_W is None else torch.from_numpy(speeds_W),
        None if limit_W is None else torch.from_numpy(limit_W),
        fewest_moved,
    ).numpy()
    return rows_I if len(rows_I) == hosts.num_instances else None


def _without_small_blocks(
    rows_I: np.ndarray,
    load_E: np.ndarray,
    hosts: Hosts,
    speeds_W: np.ndarray | None,
    limit_W: np.ndarray | None,
    fewest_moved: bool,
    least_block: int,
) -> np.ndarray:
    """Close copies with fewer than least_block rows, as many as some tries find."""
    speed_W = np.ones(hosts.num_ranks, dtype=np.int64) if speeds_W is None else speeds_W

    def highest(rows: np.ndarray) -> tuple[int, int]:
        load_W = rank_loads(rows, hosts).tolist()
        best = (0, 1)
        for load, speed in zip(load_W, speed_W.tolist(), strict=True):
            if load * best[1] > best[0] * speed:
                best = (load, speed)
        return best

    if limit_W is not None and fewest_moved and (rank_loads(rows_I, hosts) <= limit_W).all():
        bound_W = limit_W
    else:
        balanced_I = _split(load_E, hosts, speeds_W, None, False) if fewest_moved else rows_I
        assert balanced_I is not None
        most, most_speed = highest(balanced_I)
        bound_W = most * speed_W // most_speed
        if fewest_moved and limit_W is not None:
            bound_W = np.maximum(limit_W, bound_W)
    closed_I = np.zeros(hosts.num_instances, dtype=bool)

    def attempt(close_I: np.ndarray) -> np.ndarray | None:
        kept = _split(load_E, hosts.without(close_I), speeds_W, limit_W, fewest_moved)
        if kept is None:
            return None
        rows = np.zeros_like(rows_I)
        rows[~close_I] = kept
        return rows if (rank_loads(rows, hosts) <= bound_W).all() else None

    def small(rows: np.ndarray) -> np.ndarray:
        return (rows > 0) & (rows < least_block) & ~hosts.home_I

    # All of them at once costs one more split, where the others can take their rows. If not: the
    # smaller half of them, and so on.
    found = np.flatnonzero(small(rows_I))
    count = len(found)
    for _ in range(_TRIES):
        if not count:
            break
        close_I = closed_I.copy()
        close_I[found[np.argsort(rows_I[found], kind="stable")][:count]] = True
        rows = attempt(close_I)
        if rows is None:
            count //= 2
            continue
        closed_I, rows_I = close_I, rows
        found = np.flatnonzero(small(rows_I))
        count = min(count, len(found))
    return rows_I
