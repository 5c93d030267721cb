"""Shares: how much of the capacity each rank gets, by how fast it has been. Pure functions.

`moe.capacity.speed_aware`: a rank that needs twice the time per row gets half the slots of the
others, and their sum stays what it was, so that all ranks finish together. Every rank sends its
pace with the control words before each step (`engine/control.py`), so all see the same paces at the
same step and work out the same shares without another collective.

Worked example, 2 ranks with 4 experts each, C = 6, paces 100 and 200 ns a row: speeds 2 : 1, shares
4/3 and 2/3 of the even share. With scope rank the limits are 24 * 4/3 = 32 and 16 instead of 24 and
24; with scope expert 8 and 4 instead of 6 and 6.

Legend: P pools, W expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.moe.capacity import Pools

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

    The sum over the pools is kept (largest remainder, ties to the lower pool), but every pool has
    at least one slot, as without shares.
    """
    even = [size * capacity for size in pools.sizes]
    if shares_W is None:
        return even
    weights = [
        size * shares_W[owner] for size, owner in zip(pools.sizes, pools.owners, strict=True)
    ]
    slots, total = sum(even), sum(weights)
    dealt = [slots * weight // total for weight in weights]
    rest = [slots * weight % total for weight in weights]
    for pool in sorted(range(len(rest)), key=lambda pool: -rest[pool])[: slots - sum(dealt)]:
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
