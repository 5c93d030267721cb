"""Run a function on rank 0 and publish its outcome to all ranks through the store."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from typing import Any

from engine.distributed.groups import Topology
from engine.distributed.health.progress import ProgressReporter

_POLL_S = 0.02
_REMEDIES = {errno.ENOSPC: "free space there", errno.EDQUOT: "free space or raise the quota there"}
_TIMEOUT_S = 10.0  # for all ranks to receive an outcome


def on_rank_0(
    topology: Topology,
    key: str,
    work: Callable[[], Any],
    exception: type[Exception],
    reporter: ProgressReporter,
) -> Any:
    """Run `work` on rank 0 and return its JSON-ready result on every rank.

    The other ranks poll the store: unlike in a collective they may wait for as long as the work
    takes. Collective over all ranks.

    Args:
        topology: of the run.
        key: of the outcome in the store; must be unused.
        work: reports its own progress.
        exception: type that an OSError or ValueError of `work` becomes on every rank.
        reporter: reports that a rank waits.
    """
    store = topology.store
    if topology.world.rank != 0:
        reporter.wait()
        while not store.check([key]):
            time.sleep(_POLL_S)
        outcome = json.loads(store.get(key))
        store.add(f"{key}/read", 1)
        if outcome["error"] is not None:
            raise exception(outcome["error"])
        return outcome["result"]
    try:
        result = work()
    except (OSError, ValueError) as failure:
        _publish(topology, key, error=describe(failure))
        raise exception(describe(failure)) from failure
    except BaseException as failure:
        _publish(topology, key, error=f"rank 0 failed: {failure!r}", timeout_s=0)
        raise
    _publish(topology, key, result)
    return result


def _publish(
    topology: Topology, key: str, result: Any = None, error: str | None = None, timeout_s=_TIMEOUT_S
) -> None:
    """Publish an outcome and wait until all ranks have received it.

    The wait is needed where this very process holds the store.
    """
    store = topology.store
    store.set(key, json.dumps({"error": error, "result": result}))
    deadline = time.monotonic() + timeout_s
    while store.add(f"{key}/read", 0) < topology.world.size - 1 and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def describe(error: Exception) -> str:
    """Return an error in one sentence; for an OSError, the file and the system's message."""
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return f"{what}; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else what
    return str(error)
