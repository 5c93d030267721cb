"""Interleaved measurement: A B C A B C ..., because a shared machine drifts within minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def interleave(
    keys: Sequence[Key],
    rounds: int,
    measure: Callable[[Key], Value],
    pause_s: float = 0.3,
) -> dict[Key, list[Value]]:
    """Measure every key once per round, in order; return each key's values by round.

    Args:
        pause_s: before each measurement: the threads of the previous candidate spin for a moment
            after their last work and must not take a core from the next.
    """
    values: dict[Key, list[Value]] = {key: [] for key in keys}
    for _ in range(rounds):
        for key in keys:
            time.sleep(pause_s)
            values[key].append(measure(key))
    return values
