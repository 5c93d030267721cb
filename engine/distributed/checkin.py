"""The first words between ranks: each says what it has, and all decide the same from the answers.

Between `discovery` and the process groups of `bootstrap`. It runs over the store alone, so ranks
that are missing are named, and ranks that cannot run together fail with one text instead of
meeting in a collective. Everything below `check_in` is a pure function of the answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from engine.distributed.errors import RankError, RendezvousError, merge_errors, name_ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Presence:
    """One rank's answer. `gpu` is the device's unique id, or None and `no_gpu` says why."""

    rank: int
    host: str
    cores: list[int]  # CPU numbers this process may run on
    digest: str  # of the config
    gpu: str | None
    no_gpu: str
    error: str | None  # what this rank already knows to be wrong


def check_in(
    store: dist.Store, own: Presence, world_size: int, timeout: timedelta
) -> list[Presence]:
    """All ranks' answers, in rank order. Collective over the world, through the store.

    Raises RankError, with the same text on every rank, for an error in an answer or configs that
    differ; RendezvousError when ranks are missing after `timeout`.
    """
    keys = [f"presence/{rank}" for rank in range(world_size)]
    store.set(keys[own.rank], json.dumps(dataclasses.asdict(own)))
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:  # a timeout or a lost store; types differ between torch versions
        raise RendezvousError(_who_is_missing(store, keys, timeout)) from error
    present = [Presence(**json.loads(value)) for value in store.multi_get(keys)]
    if problem := _problem(present):
        _leave_together(store, own.rank, world_size)
        raise RankError(problem)
    return present


def _who_is_missing(store: dist.Store, keys: Sequence[str], timeout: timedelta) -> str:
    try:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        return (
            "the store that introduces the ranks is gone: look for the error of rank 0, or of "
            "torchrun on its host"
        )
    late = name_ranks(missing) if missing else "the last"  # that one came while we counted
    return (
        f"{late} of {len(keys)} did not arrive within "
        f"{timeout.total_seconds():g} s: look for their own error, or raise runtime.timeout_s if "
        "they start that slowly"
    )


def _problem(present: Sequence[Presence]) -> str | None:
    if errors := {rank.rank: rank.error for rank in present if rank.error is not None}:
        return merge_errors(errors, len(present))
    ranks_of: dict[str, list[int]] = defaultdict(list)
    for rank in present:
        ranks_of[rank.digest].append(rank.rank)
    if len(ranks_of) == 1:
        return None
    groups = "; ".join(
        f"{name_ranks(ranks)} ({digest[:12]})"
        for digest, ranks in sorted(ranks_of.items(), key=lambda item: -len(item[1]))
    )
    return (
        f"the ranks were started with different configs, by digest: {groups}. Give every rank the "
        "same --config and --set (compare what --print-config shows on each host)"
    )


def _leave_together(store: dist.Store, rank: int, world_size: int) -> None:
    """Keep rank 0, which may hold the store, until the others have read it (5 s at most)."""
    deadline = time.monotonic() + 5
    with contextlib.suppress(RuntimeError):  # rank 0 has waited and left: no matter, all is read
        store.add("read", 1)
        while rank == 0 and store.add("read", 0) < world_size and time.monotonic() < deadline:
            time.sleep(0.02)


def choose_device(requested: str, present: Sequence[Presence]) -> str:
    """`cuda` or `cpu` for the whole run, from `runtime.device` and all answers.

    auto takes CUDA when every rank has a GPU of its own, and the CPU otherwise. Raises RankError
    where cuda is asked for and a rank has none, or shares one.
    """
    if requested == "cpu":
        return "cpu"
    without: dict[tuple[str, str], list[int]] = defaultdict(list)
    owners: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank in present:
        if rank.gpu is None:
            without[rank.host, rank.no_gpu].append(rank.rank)
        else:
            owners[rank.host, rank.gpu].append(rank.rank)
    problems = [f"{name_ranks(ranks)} on {host}: {why}" for (host, why), ranks in without.items()]
    problems += [
        f"{name_ranks(ranks)} on {host}: one GPU between them"
        for (host, _), ranks in owners.items()
        if len(ranks) > 1
    ]
    if not problems:
        return "cuda"
    if requested == "auto":
        return "cpu"
    raise RankError(
        f"runtime.device = 'cuda' needs a GPU of its own for every rank ({'; '.join(problems)}): "
        "start at most one rank a GPU (torchrun --nproc-per-node), or set runtime.device=cpu"
    )


def share_of_cores(rank: int, present: Sequence[Presence]) -> int:
    """CPU threads for `rank`: its cores, each divided by the ranks of its host that may use it.

    Ranks the launcher has bound to cores of their own keep them all. At least 1.
    """
    own = present[rank]
    users = Counter(core for other in present if other.host == own.host for core in other.cores)
    return max(1, int(sum(1 / users[core] for core in own.cores) + 1e-6))
