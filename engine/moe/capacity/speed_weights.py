"""Speed weights: how much of the capacity each rank gets, by its measured speed. Pure functions.

`moe.capacity.speed_aware`: a rank that needs twice the time per row gets half the slots of the
others, and their sum is unchanged, so that all ranks finish together. Every rank sends its time per
row with the step control message (`control.py`), so all of them have the same times at the same
step and compute the same weights without another collective.

Worked example, 2 ranks with 4 experts each, C = 6, 100 and 200 ns per row: speeds 2 : 1, weights
4/3 and 2/3. With scope rank the limits are 24 * 4/3 = 32 and 16 instead of 24 and 24; with scope
expert 8 and 4 instead of 6 and 6.

Legend: P pools, W expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.moe.capacity.limits import Pools

# A weight of ONE is an equal share of the capacity; weights are within these bounds.
ONE = 1024
MIN_WEIGHT, MAX_WEIGHT = ONE // 4, 2 * ONE
# Ranks whose times per row differ by at most this many twentieths count as equally fast.
_NOISE = 1
# Steps between two updates.
UPDATE_EVERY = 4


def speed_weights(times_per_row: Sequence[int]) -> tuple[int, ...] | None:
    """Return each rank's weight; None where all are about equally fast, or a time is unknown.

    times_per_row: W numbers in any unit, 0 where unknown. Integers only, so that every rank
    computes the same.
    """
    slowest, fastest = max(times_per_row), min(times_per_row)
    if fastest <= 0 or slowest * 20 <= fastest * (20 + _NOISE):
        return None
    scale = slowest << 20
    speeds = [scale // time for time in times_per_row]
    total = sum(speeds)
    found = tuple(
        min(MAX_WEIGHT, max(MIN_WEIGHT, speed * len(speeds) * ONE // total)) for speed in speeds
    )
    return None if len(set(found)) == 1 else found


def limits(pools: Pools, capacity: int, weights_W: Sequence[int] | None) -> list[int]:
    """Return the slots of every pool: its size times the capacity, by its owner's weight.

    No pool gets more than MAX_WEIGHT / ONE of its equal limit, for which `memory.py` reserves
    buffers: where the sum of the weights is below W, the excess is partitioned over the others in
    proportion. The sum over the pools is kept (largest remainder, ties to the lower pool), but
    every pool has at least one slot, as without weights.

    Worked example, times per row of 1 and seven times 100, each rank a pool with an equal limit of
    12: weights 2 and seven times 1/4, so the first gets 24, not 96 * 2 / 3.75 = 51, and 72 slots
    are left for the seven.
    """
    even = [size * capacity for size in pools.sizes]
    if weights_W is None:
        return even
    weights = [
        size * weights_W[owner] for size, owner in zip(pools.sizes, pools.owners, strict=True)
    ]
    return _weighted(even, weights)


def rank_limits(slots: int, num_ranks: int, weights_W: Sequence[int] | None) -> list[int]:
    """Return the slots of every rank where ranks share all slots, as they do with copies: equal
    parts, the remainder to the lower ranks, or by their weights as in `limits`.
    """
    each, more = divmod(slots, num_ranks)
    even = [each + (rank < more) for rank in range(num_ranks)]
    return even if weights_W is None else _weighted(even, list(weights_W))


def _weighted(even: list[int], weights: list[int]) -> list[int]:
    """Return equal limits redistributed by weights; see `limits`."""
    most = [limit * MAX_WEIGHT // ONE for limit in even]
    slots_of, slots, free = most.copy(), sum(even), list(range(len(even)))
    # Pools above their maximum get just that; repeat for the others with the slots that are left.
    while True:
        total = sum(weights[pool] for pool in free)
        over = {pool for pool in free if slots * weights[pool] > most[pool] * total}
        if not over:
            break
        # Never all of them: together they may have twice the slots that there are.
        slots -= sum(most[pool] for pool in over)
        free = [pool for pool in free if pool not in over]
    for pool in free:
        slots_of[pool] = slots * weights[pool] // total
    rest = sorted(free, key=lambda pool: -(slots * weights[pool] % total))
    for pool in rest[: slots - sum(slots_of[pool] for pool in free)]:
        slots_of[pool] += 1
    return [max(1, limit) for limit in slots_of]


class SpeedWeights:
    """The weights of a group, updated every few steps from the times per row of all its ranks."""

    def __init__(self) -> None:
        self.current: tuple[int, ...] | None = None
        self._steps = 0

    def update(self, times_per_row: Sequence[int]) -> bool:
        """Add the times of one step; return True where the weights have changed noticeably.

        Every rank must call with the same times in the same step.
        """
        self._steps += 1
        if self._steps % UPDATE_EVERY:
            return False
        before = self.current or (ONE,) * len(times_per_row)
        self.current = speed_weights(times_per_row)
        after = self.current or (ONE,) * len(times_per_row)
        return any(abs(new - old) * 20 > ONE for new, old in zip(after, before, strict=True))
