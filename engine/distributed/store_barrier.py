"""A barrier without a time limit: replicas of a model may end a job minutes apart.

A collective would give up after `runtime.timeout_s`. Here ranks count themselves in the store and
look again and again; whether the others are still alive is the watchdog's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist

_FIRST_POLL_S = 0.005
_LAST_POLL_S = 0.5


def meet(
    store: dist.Store, key: str, world_size: int, check: Callable[[], None] = lambda: None
) -> None:
    """Wait until all ranks have come. A key may be used again by the same ranks.

    check: called while this rank waits; may raise. Raises RuntimeError when the store is gone.
    Collective over the world, through the store.
    """
    arrival = store.add(key, 1) - 1
    full = (arrival // world_size + 1) * world_size  # the end of this round of arrivals
    pause_s = _FIRST_POLL_S
    while store.add(key, 0) < full:
        check()
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, _LAST_POLL_S)
