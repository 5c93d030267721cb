"""Shares: how much of the capacity each rank gets, by how fast it has been. Pure functions.

`moe.capacity.speed_aware`: a rank that needs twice the time per row gets half the slots of the
others, and their sum stays what it was, so that all ranks finish together. Every rank sends its
pace with the control words before each step (`control.py`), so all see the same paces at the
same step and work out the same shares without another collective.

Worked example, 2 ranks with 4 experts each, C = 6, paces 100 and 200 ns a row: speeds 2 : 1, shares
4/3 and 2/3 of the even share. With scope rank the limits are 24 * 4/3 = 32 and 16 instead of 24 and
24; with scope expert 8 and 4 instead of 6 and 6.

Legend: P pools, W expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.moe.capacity.limits import Pools

# A share is a multiple of the even one, in units of 1/ONE, within these bounds.
ONE = 1024
LEAST, MOST = ONE // 4, 2 * ONE
# Ranks whose paces are within this many twentieths of each other are as fast as each other.
_NOISE = 1
# Steps between two changes.
EVERY = 4


def shares(paces: Sequence[int]) -> tuple[int, ...] | None:
    """Each rank's share from its pace; None where all are about the same, or not all are known.

    paces: W numbers, time a row in any unit, 0 where unknown. Integers only: every rank gets the
    same answer.
    """
    if min(paces) <= 0 or max(paces) * 20 <= min(paces) * (20 + _NOISE):
        return None
    scale = max(paces) << 20
    speeds = [scale // pace for pace in paces]
    total = sum(speeds)
    found = tuple(min(MOST, max(LEAST, speed * len(paces) * ONE // total)) for speed in speeds)
    return None if len(set(found)) == 1 else found


def limits(pools: Pools, capacity: int, shares_W: Sequence[int] | None) -> list[int]:
    """Slots of every pool: its size times the capacity, dealt out anew by its owner's share.

    No pool gets more than MOST / ONE of its even limit, which is what `memory.py` reserves
    for: where the sum of the shares is below W, what is above goes to the others in proportion. The
    sum over the pools is kept (largest remainder, ties to the lower pool), but every pool has at
    least one slot, as without shares.

    Paces of 1 and seven times 100, each rank a pool with an even limit of 12: shares 2 and seven
    times 1/4, so the first gets 24, not 96 * 2 / 3.75 = 51, and 72 slots are left for the seven.
    """
    even = [size * capacity for size in pools.sizes]
    if shares_W is None:
        return even
    weights = [
        size * shares_W[owner] for size, owner in zip(pools.sizes, pools.owners, strict=True)
    ]
    most = [limit * MOST // ONE for limit in even]
    dealt, slots, free = most.copy(), sum(even), list(range(len(even)))
    while True:
        total = sum(weights[pool] for pool in free)
        over = {pool for pool in free if slots * weights[pool] > most[pool] * total}
        if not over:
            break
        # Never all of them: together they may have twice what there is.
        slots -= sum(most[pool] for pool in over)
        free = [pool for pool in free if pool not in over]
    for pool in free:
        dealt[pool] = slots * weights[pool] // total
    rest = sorted(free, key=lambda pool: -(slots * weights[pool] % total))
    for pool in rest[: slots - sum(dealt[pool] for pool in free)]:
        dealt[pool] += 1
    return [max(1, limit) for limit in dealt]


class Shares:
    """The shares that a group runs under, renewed every few steps from everybody's paces."""

    def __init__(self) -> None:
        self.current: tuple[int, ...] | None = None
        self._steps = 0

    def update(self, paces: Sequence[int]) -> bool:
        """Take the paces of one step; True where the shares have changed noticeably.

        Every rank must call with the same paces in the same step.
        """
        self._steps += 1
        if self._steps % EVERY:
            return False
        before = self.current or (ONE,) * len(paces)
        self.current = shares(paces)
        after = self.current or (ONE,) * len(paces)
        return any(abs(new - old) * 20 > ONE for new, old in zip(after, before, strict=True))
