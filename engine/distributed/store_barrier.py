"""A barrier without a time limit: replicas of a model may finish a job minutes apart.

A collective would time out after `runtime.timeout_s`. Here every rank increments a counter in the
store and polls it; whether the other ranks are alive is the watchdog's concern.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist

_FIRST_POLL_S = 0.005
_LAST_POLL_S = 0.5


def barrier(
    store: dist.Store, key: str, world_size: int, check: Callable[[], None] = lambda: None
) -> None:
    """Wait until all ranks have reached the barrier. The same ranks may use a key again.

    Collective over the world, through the store.

    Args:
        check: called while this rank waits; may raise.

    Raises:
        RuntimeError: the store is unreachable.
    """
    arrival = store.add(key, 1) - 1
    full = (arrival // world_size + 1) * world_size  # the count at which this round is complete
    pause_s = _FIRST_POLL_S
    while store.add(key, 0) < full:
        check()
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, _LAST_POLL_S)
