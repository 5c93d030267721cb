"""Rendezvous: every rank publishes its info, and all ranks decide the same from all infos.

Between `discovery.py` and the process groups of `bootstrap.py`. It uses the store alone, so missing
ranks are named, and ranks that cannot run together fail with one text instead of hanging in a
collective.

The store may hold keys of other runs: torchrun's agent keeps one from restart to restart, whose
ranks had the same numbers. So every rank draws a random id, and waits only for keys that contain an
id of this run:

    rank r   info/r = its info                  polled by rank 0
    rank 0   admitted/<r's id> = its own id     rank 0 runs now; its id is the name of the run
    rank r   <run>/confirmed/<r's id>           rank r runs now
    rank 0   <run>/release                      all infos, once every rank has confirmed

The info of a rank of an earlier run is never confirmed, and is overwritten by the rank that joins.
Everything below `join` and its helpers is a pure function of the infos.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from engine.distributed.errors import RankError, RendezvousError, merge_errors, name_ranks

_POLL_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class RankInfo:
    """What a rank publishes at the rendezvous."""

    rank: int
    host: str
    cores: list[int]  # CPU numbers this process may run on
    digest: str = ""  # of the config
    gpu: str | None = None  # the unique id of the device that its local rank chooses
    no_gpu: str = ""  # why `gpu` is None
    gpus: list[str] = field(default_factory=list)  # the unique ids of all devices that it sees
    error: str | None = None  # what this rank already knows to be wrong


def join(
    store: dist.Store, own: RankInfo, world_size: int, timeout: timedelta
) -> tuple[list[RankInfo], str]:
    """Return the infos of all ranks, in rank order, and a name for this run that no other has.

    Collective over the world, through the store.

    Raises:
        RankError: a rank's info has an error, or configs differ; with the same text on every rank.
        RendezvousError: ranks are missing after `timeout`.
    """
    own_id = uuid.uuid4().hex
    try:
        store.set(f"info/{own.rank}", json.dumps({"id": own_id, "info": dataclasses.asdict(own)}))
        if own.rank == 0:
            run, values = own_id, _admit_all(store, own_id, world_size, timeout)
        else:
            store.wait([f"admitted/{own_id}"], timeout)
            run = store.get(f"admitted/{own_id}").decode()
            store.set(_confirmed(run, own_id), "")
            store.wait([f"{run}/release"], timeout)
            values = json.loads(store.get(f"{run}/release"))
    # A timeout or a lost store; the types of these differ between torch versions.
    except (RuntimeError, TimeoutError) as error:
        missing = _describe_missing(store, own.rank, own_id, world_size, timeout)
        raise RendezvousError(missing) from error
    infos = [RankInfo(**each) for each in values]
    if problem := _problem(infos):
        _wait_for_readers(dist.PrefixStore(run, store), own.rank, world_size)
        raise RankError(problem)
    return infos, run


def _confirmed(run: str, rank_id: str) -> str:
    return f"{run}/confirmed/{rank_id}"


def _admit_all(
    store: dist.Store, own_id: str, world_size: int, timeout: timedelta
) -> list[dict[str, Any]]:
    """Admit every rank until all have confirmed; return their infos. For rank 0."""
    deadline = time.monotonic() + timeout.total_seconds()
    admitted = {own_id}
    store.set(_confirmed(own_id, own_id), "")
    while True:
        published = _read_published(store, world_size)
        ids = [each["id"] for each in published.values()]
        for rank_id in ids:
            if rank_id not in admitted:
                store.set(f"admitted/{rank_id}", own_id)
                admitted.add(rank_id)
        if len(ids) == world_size and store.check([_confirmed(own_id, each) for each in ids]):
            infos = [published[rank]["info"] for rank in range(world_size)]
            store.set(f"{own_id}/release", json.dumps(infos))
            return infos
        if time.monotonic() >= deadline:
            raise TimeoutError
        time.sleep(_POLL_S)


def _read_published(store: dist.Store, world_size: int) -> dict[int, dict[str, Any]]:
    """Return the ids and infos published so far, by rank; some may be of an earlier run."""
    keys = [f"info/{rank}" for rank in range(world_size)]
    if store.check(keys):
        values: Sequence[bytes | None] = store.multi_get(keys)
    else:  # reading a key that is missing would wait for it
        values = [store.get(key) if store.check([key]) else None for key in keys]
    return {rank: json.loads(value) for rank, value in enumerate(values) if value is not None}


def _describe_missing(
    store: dist.Store, own: int, own_id: str, world_size: int, timeout: timedelta
) -> str:
    try:
        published = _read_published(store, world_size)
        run = own_id if own == 0 else None
        if own != 0 and store.check([f"admitted/{own_id}"]):
            run = store.get(f"admitted/{own_id}").decode()
        if run is None:  # an info of rank 0, if there is one, is of an earlier run
            joined = set(published) - {0}
        else:
            joined = {
                n for n, each in published.items() if store.check([_confirmed(run, each["id"])])
            }
    except RuntimeError:
        return (
            "the rendezvous store is unreachable: look for the error of rank 0, or of torchrun on "
            "its host"
        )
    missing = [rank for rank in range(world_size) if rank not in joined]
    late = name_ranks(missing) if missing else "the last"  # which has joined since the timeout
    return (
        f"{late} of {world_size} did not join within "
        f"{timeout.total_seconds():g} s: look for their own error, or raise runtime.timeout_s if "
        "they start that slowly"
    )


def _problem(infos: Sequence[RankInfo]) -> str | None:
    if errors := {rank.rank: rank.error for rank in infos if rank.error is not None}:
        return merge_errors(errors, len(infos), [rank.host for rank in infos])
    ranks_of: dict[str, list[int]] = defaultdict(list)
    for rank in infos:
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


def _wait_for_readers(store: dist.Store, rank: int, world_size: int) -> None:
    """Keep rank 0, which may hold the store, until all ranks have read the infos (5 s at most)."""
    deadline = time.monotonic() + 5
    with contextlib.suppress(RuntimeError):  # rank 0 has exited after its wait: all have read
        store.add("read", 1)
        while rank == 0 and store.add("read", 0) < world_size and time.monotonic() < deadline:
            time.sleep(0.02)


def assign_gpus(infos: Sequence[RankInfo]) -> list[RankInfo]:
    """Return the infos with a GPU of its own for every rank, on each host where that is possible.

    What the local rank chooses is kept where the choices of a host differ. They need not where a
    launcher shows each rank other GPUs (srun --gpus-per-task 2): there every rank, in their order,
    takes the first GPU it sees that no other has. Where that leaves a rank without, nothing changes
    on the host.
    """
    assigned = {info.rank: info for info in infos}
    for host in dict.fromkeys(info.host for info in infos):
        ranks = [info for info in infos if info.host == host]
        chosen = {info.gpu for info in ranks}
        if None not in chosen and len(chosen) == len(ranks):
            continue
        taken: dict[str, RankInfo] = {}
        for info in ranks:
            free = next((gpu for gpu in info.gpus if gpu not in taken), None)
            if free is not None:
                taken[free] = replace(info, gpu=free, no_gpu="")
        if len(taken) == len(ranks):
            assigned.update((info.rank, info) for info in taken.values())
    return [assigned[info.rank] for info in infos]


def choose_device(requested: str, infos: Sequence[RankInfo]) -> str:
    """Return `cuda` or `cpu` for the whole run, from `runtime.device` and the infos of all ranks.

    auto takes CUDA when every rank has a GPU of its own, and the CPU otherwise.

    Raises:
        RankError: cuda is requested, and a rank has no GPU or shares one.
    """
    if requested == "cpu":
        return "cpu"
    without: dict[tuple[str, str], list[int]] = defaultdict(list)
    owners: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank in infos:
        if rank.gpu is None:
            without[rank.host, rank.no_gpu].append(rank.rank)
        else:
            owners[rank.host, rank.gpu].append(rank.rank)
    problems = [f"{name_ranks(ranks)} on {host}: {why}" for (host, why), ranks in without.items()]
    problems += [
        f"{name_ranks(ranks)} on {host}: share one GPU, {gpu}"
        for (host, gpu), ranks in owners.items()
        if len(ranks) > 1
    ]
    if not problems:
        return "cuda"
    if requested == "auto":
        return "cpu"
    raise RankError(
        f"runtime.device = 'cuda' needs a GPU of its own for every rank ({'; '.join(problems)}): "
        "start at most one rank per GPU (torchrun --nproc-per-node, srun --gpus-per-task 1), or "
        "set runtime.device=cpu"
    )


def share_of_cores(rank: int, infos: Sequence[RankInfo]) -> int:
    """Return the CPU threads for `rank`, at least 1.

    Each of its cores is divided by the ranks of its host that may use it, so ranks that the
    launcher has bound to cores of their own keep them all.
    """
    own = infos[rank]
    users = Counter(core for other in infos if other.host == own.host for core in other.cores)
    return max(1, int(sum(1 / users[core] for core in own.cores) + 1e-6))
