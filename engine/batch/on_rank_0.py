"""Run a function on rank 0 and broadcast its outcome."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from engine.distributed.groups import Topology
from engine.distributed.health.progress import ProgressReporter

_POLL_S = 0.02


_HEAR_S = 10.0


def on_rank_0(
    topology: Topology,
    key: str,
    work: Callable[[], Any],
    exception: type[Exception],
    activity: ProgressReporter,
) -> Any:
    """Run `work` on rank 0 and return its JSON-ready result on every rank.

    An OSError or ValueError of `work` becomes `exception` on every rank. The others poll the store:
    unlike in a collective they may wait for as long as the work takes. activity: told of the
    waiting; the work says how it gets on. Collective over all ranks.
    """
    store = topology.store
    if topology.world.rank != 0:
        activity.wait()
        while not store.check([key]):
            time.sleep(_POLL_S)
        outcome = json.loads(store.get(key))
        store.add(f"{key}/heard", 1)
        if outcome["error"] is not None:
            raise exception(outcome["error"])
        return outcome["result"]
    try:
        result = work()
    except (OSError, ValueError) as failure:
        _tell(topology, key, error=describe(failure))
        raise exception(describe(failure)) from failure
    except BaseException as failure:
        _tell(topology, key, error=f"rank 0 broke off: {failure!r}", patience_s=0)
        raise
    _tell(topology, key, result)
    return result


def _tell(
    topology: Topology, key: str, result: Any = None, error: str | None = None, patience_s=_HEAR_S
) -> None:
    """Publish an outcome and wait until all have heard: the store may be this very process."""
    store = topology.store
    store.set(key, json.dumps({"error": error, "result": result}))
    deadline = time.monotonic() + patience_s
    while store.add(f"{key}/heard", 0) < topology.world.size - 1 and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def describe(error: Exception) -> str:
    """An error in one sentence; of an OSError, the file and what the system says."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
