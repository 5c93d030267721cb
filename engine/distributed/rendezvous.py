"""The first words between ranks: each says what it has, and all decide the same from the answers.

Between `discovery` and the process groups of `bootstrap`. It runs over the store alone, so ranks
that are missing are named, and ranks that cannot run together fail with one text instead of
meeting in a collective.

The store may remember other runs: torchrun's agent keeps one from restart to restart, whose ranks
had the same numbers. So every rank draws a nonce, and waits only for keys that hold a nonce of now:

    rank r   presence/r = its answer             rank 0 looks at these again and again
    rank 0   seat/<r's nonce> = its own nonce    it has seen this very rank r; its nonce names the
    rank r   <run>/here/<r's nonce>              run, and nobody of an earlier one can say so
    rank 0   <run>/go                            all answers, once every rank is here

A presence of an earlier run is never here, and gives way to that of the rank that arrives.
Everything below `check_in` and its helpers is a pure function of the answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from engine.distributed.errors import RankError, RendezvousError, merge_errors, name_ranks

_POLL_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class RankInfo:
    """One rank's answer. `gpu` is the device's unique id, or None and `no_gpu` says why."""

    rank: int
    host: str
    cores: list[int]  # CPU numbers this process may run on
    digest: str  # of the config
    gpu: str | None
    no_gpu: str
    error: str | None  # what this rank already knows to be wrong


def check_in(
    store: dist.Store, own: RankInfo, world_size: int, timeout: timedelta
) -> tuple[list[RankInfo], str]:
    """All ranks' answers, in rank order, and a name for this run that no other run has.

    Collective over the world, through the store. Raises RankError, with the same text on every
    rank, for an error in an answer or configs that differ; RendezvousError when ranks are missing
    after `timeout`.
    """
    nonce = uuid.uuid4().hex
    answer = json.dumps({"nonce": nonce, "presence": dataclasses.asdict(own)})
    try:
        store.set(_presence(own.rank), answer)
        if own.rank == 0:
            run, answers = nonce, _seat_all(store, nonce, world_size, timeout)
        else:
            store.wait([f"seat/{nonce}"], timeout)
            run = store.get(f"seat/{nonce}").decode()
            store.set(_here(run, nonce), "")
            store.wait([f"{run}/go"], timeout)
            answers = json.loads(store.get(f"{run}/go"))
    # A timeout or a lost store; the types of these differ between torch versions.
    except (RuntimeError, TimeoutError) as error:
        missing = _who_is_missing(store, own.rank, nonce, world_size, timeout)
        raise RendezvousError(missing) from error
    present = [RankInfo(**values) for values in answers]
    if problem := _problem(present):
        _leave_together(dist.PrefixStore(run, store), own.rank, world_size)
        raise RankError(problem)
    return present, run


def _presence(rank: int) -> str:
    return f"presence/{rank}"


def _here(run: str, nonce: str) -> str:
    return f"{run}/here/{nonce}"


def _seat_all(
    store: dist.Store, nonce: str, world_size: int, timeout: timedelta
) -> list[dict[str, Any]]:
    """What rank 0 does: see every rank, until all are here; return their answers."""
    deadline = time.monotonic() + timeout.total_seconds()
    seated = {nonce}
    store.set(_here(nonce, nonce), "")
    while True:
        answers = _answers(store, world_size)
        found = [answer["nonce"] for answer in answers.values()]
        for other in found:
            if other not in seated:
                store.set(f"seat/{other}", nonce)
                seated.add(other)
        if len(found) == world_size and store.check([_here(nonce, n) for n in found]):
            all_answers = [answers[rank]["presence"] for rank in range(world_size)]
            store.set(f"{nonce}/go", json.dumps(all_answers))
            return all_answers
        if time.monotonic() >= deadline:
            raise TimeoutError
        time.sleep(_POLL_S)


def _answers(store: dist.Store, world_size: int) -> dict[int, dict[str, Any]]:
    """The answers that there are, perhaps of ranks of an earlier run, by rank."""
    keys = [_presence(rank) for rank in range(world_size)]
    if store.check(keys):
        values: Sequence[bytes | None] = store.multi_get(keys)
    else:  # reading a key that is missing would wait for it
        values = [store.get(key) if store.check([key]) else None for key in keys]
    return {rank: json.loads(value) for rank, value in enumerate(values) if value is not None}


def _who_is_missing(
    store: dist.Store, own: int, nonce: str, world_size: int, timeout: timedelta
) -> str:
    try:
        answers = _answers(store, world_size)
        run = nonce if own == 0 else None
        if own != 0 and store.check([f"seat/{nonce}"]):
            run = store.get(f"seat/{nonce}").decode()
        if run is None:  # what is there of rank 0, if anything, is from an earlier run
            here = set(answers) - {0}
        else:
            here = {n for n, each in answers.items() if store.check([_here(run, each["nonce"])])}
    except RuntimeError:
        return (
            "the store that introduces the ranks is gone: look for the error of rank 0, or of "
            "torchrun on its host"
        )
    missing = [rank for rank in range(world_size) if rank not in here]
    late = name_ranks(missing) if missing else "the last"  # that one came while we counted
    return (
        f"{late} of {world_size} did not arrive within "
        f"{timeout.total_seconds():g} s: look for their own error, or raise runtime.timeout_s if "
        "they start that slowly"
    )


def _problem(present: Sequence[RankInfo]) -> str | None:
    if errors := {rank.rank: rank.error for rank in present if rank.error is not None}:
        return merge_errors(errors, len(present), [rank.host for rank in present])
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


def choose_device(requested: str, present: Sequence[RankInfo]) -> str:
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


def share_of_cores(rank: int, present: Sequence[RankInfo]) -> int:
    """CPU threads for `rank`: its cores, each divided by the ranks of its host that may use it.

    Ranks the launcher has bound to cores of their own keep them all. At least 1.
    """
    own = present[rank]
    users = Counter(core for other in present if other.host == own.host for core in other.cores)
    return max(1, int(sum(1 / users[core] for core in own.cores) + 1e-6))
