"""From one config on many processes to a `Topology`: the first thing a rank does.

    discover    the launcher's environment -> who am I                    (discovery.py)
    check in    every rank's host, GPU, config digest and errors -> all   (checkin.py)
    join        device, CPU threads, process groups -> Topology

A mistake is raised by every rank with the same text before a process group exists: also one that
only one host makes (`broadcast_startup_error`), as a file that it lacks.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from engine.config import Config
from engine.config.loader import digest
from engine.config.preflight import read_num_experts
from engine.config.world_rules import expert_ranks, validate_world
from engine.distributed.discovery import Launch, discover
from engine.distributed.errors import RankError, RendezvousError, UnreportedError
from engine.distributed.groups import Group, Topology, layout
from engine.distributed.launch_agent import die_with_agent, kill_stopped_workers
from engine.distributed.rendezvous import RankInfo, check_in, choose_device, share_of_cores
from engine.distributed.shared_memory import BACKEND as SHARED_MEMORY
from engine.distributed.shared_memory import open_lane

__all__ = ["PATIENCE_S", "Launch", "discover", "start", "stop", "broadcast_startup_error"]

logger = logging.getLogger(__name__)
PATIENCE_S = 20.0  # for others to hear of an error; their imports may take that long


@contextmanager
def broadcast_startup_error(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """What a rank does before `start`, alone: a ValueError of it becomes that of every rank.

    The others hear of it in `start`, or here where they have one too. Raises RankError with the
    same text on every rank; UnreportedError where they do not meet within PATIENCE_S.
    """
    try:
        yield
    except ValueError as error:
        launch, timeout = discover(environ), timedelta(seconds=PATIENCE_S)
        die_with_agent(environ)
        own = _presence(launch, digest="", gpu=None, no_gpu="", error=str(error))
        try:
            store = dist.PrefixStore("lockstep", _rendezvous(launch, timeout, environ))
            check_in(store, own, launch.world_size, timeout)  # raises the error
        except RankError as same_on_all:
            raise same_on_all from error
        except RendezvousError as apart:
            raise UnreportedError(f"{error}\nThe other ranks do not know of it: {apart}") from error


def start(config: Config, environ: Mapping[str, str] = os.environ) -> Topology:
    """Join the run that the launcher's environment describes.

    Collective over the world. Sets the CUDA device and torch's number of CPU threads. Raises
    ValueError with the same text on every rank; RendezvousError when ranks do not meet.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is already initialised in this process: one engine at a time; call "
            "close() on the first, or destroy_process_group()"
        )
    launch = discover(environ)
    die_with_agent(environ)
    timeout = timedelta(seconds=config.runtime.timeout_s)
    store = dist.PrefixStore("lockstep", _rendezvous(launch, timeout, environ))
    gpu_index, gpu, no_gpu = _find_gpu(config, launch)
    config, problem = _fit_world(config, launch)
    own = _presence(launch, digest=digest(config), gpu=gpu, no_gpu=no_gpu, error=problem)
    try:
        return _meet(config, launch, environ, store, own, gpu_index)
    except RuntimeError:  # somebody did not come, or left again
        kill_stopped_workers(environ)
        raise


def _presence(
    launch: Launch, *, digest: str, gpu: str | None, no_gpu: str, error: str | None
) -> RankInfo:
    return RankInfo(
        rank=launch.rank,
        host=socket.gethostname(),
        cores=sorted(os.sched_getaffinity(0)),
        digest=digest,
        gpu=gpu,
        no_gpu=no_gpu,
        error=error,
    )


def _meet(
    config: Config,
    launch: Launch,
    environ: Mapping[str, str],
    store: dist.Store,
    own: RankInfo,
    gpu_index: int,
) -> Topology:
    """Check in, agree on the device, join."""
    timeout = timedelta(seconds=config.runtime.timeout_s)
    present, run = check_in(store, own, launch.world_size, timeout)
    store = dist.PrefixStore(run, store)  # it may outlive this run and hold another's keys
    kind = choose_device(config.runtime.device, present)
    if launch.rank == 0 and kind == "cpu" != config.runtime.device and any(p.gpu for p in present):
        logger.warning("runtime.device = auto: running on CPU, not every rank has a GPU of its own")
    device = torch.device("cuda", gpu_index) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(_num_threads(config, launch, environ, present))
    atexit.register(_let_gloo_finish)
    holder = None if _launcher_holds_store(environ) else 0
    return _join(config, launch, device, store, timeout, holder)


def stop(topology: Topology) -> None:
    """Leave the run: destroy all process groups. Not collective; safe to call twice."""
    atexit.unregister(_let_gloo_finish)
    if dist.is_initialized():
        dist.destroy_process_group()
    for group in (topology.world, topology.expert, topology.tensor, topology.control):
        # The last reference: gloo's destructor joins its threads (see _let_gloo_finish).
        object.__setattr__(group, "handle", None)


def _let_gloo_finish() -> None:
    """At an exit without `stop`: yield the GIL, which gloo's threads need to free their tensors.

    A thread that is still about to do so when the interpreter ends aborts the process; without
    this, one exit in eight that follows a collective at once.
    """
    time.sleep(0.05)


def _fit_world(config: Config, launch: Launch) -> tuple[Config, str | None]:
    """The config with `parallel.expert: auto` as a number, and what does not fit this world."""
    try:
        if config.parallel.expert == "auto":
            num_experts = read_num_experts(Path(config.model.path))
            size = expert_ranks(config.parallel, launch.world_size, num_experts)
            config = replace(config, parallel=replace(config.parallel, expert=size))
        validate_world(config, launch.world_size)
    except ValueError as error:
        return config, str(error)
    return config, None


def _rendezvous(launch: Launch, timeout: timedelta, environ: Mapping[str, str]) -> dist.Store:
    """The store that all ranks of the run share; rank 0 holds it unless torchrun's agent does."""
    if launch.source == "single":
        return dist.HashStore()
    holds = launch.rank == 0 and not _launcher_holds_store(environ)
    try:
        return dist.TCPStore(launch.addr, launch.port, None, holds, timeout, wait_for_workers=False)
    except RuntimeError as error:  # the store's network and timeout errors
        action = "listen at" if holds else "reach the rendezvous at"
        if holds:
            advice = "choose another MASTER_PORT"
        elif _launcher_holds_store(environ):
            # torch 2.13: an agent remembers where the first round's store was.
            advice = (
                "look for torchrun's own error there; if that node was lost, start torchrun with "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, so that each restart makes a new store"
            )
        else:
            advice = "look for rank 0's own error, or set MASTER_ADDR and MASTER_PORT"
        raise RendezvousError(
            f"rank {launch.rank} on {socket.gethostname()} could not {action} "
            f"{launch.addr}:{launch.port}: {advice} ({str(error).splitlines()[0]})"
        ) from error


def _launcher_holds_store(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's agent holds the store, and not rank 0."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _find_gpu(config: Config, launch: Launch) -> tuple[int, str | None, str]:
    """(device index, its unique id or None, why there is none) for this rank."""
    if config.runtime.device == "cpu":
        return 0, None, "none"
    if not torch.cuda.is_available():
        return 0, None, f"no CUDA device (torch {torch.__version__} sees none)"
    count = torch.cuda.device_count()
    # One visible device and several local ranks: the launcher gave each rank its own GPU (Slurm's
    # --gpus-per-task), or all share the only one. The unique ids, compared by all ranks, tell.
    index = launch.local_rank if count > 1 else 0
    if index >= count:
        return 0, None, f"local rank {index}, but only {count} CUDA devices"
    return index, str(torch.cuda.get_device_properties(index).uuid), ""


def _num_threads(
    config: Config, launch: Launch, environ: Mapping[str, str], present: list[RankInfo]
) -> int:
    """`runtime.threads`, else OMP_NUM_THREADS, else this rank's share of its host's cores.

    torchrun sets OMP_NUM_THREADS=1 by itself, so under torchrun a 1 counts as not set.
    """
    if config.runtime.threads is not None:
        return config.runtime.threads
    omp = environ.get("OMP_NUM_THREADS", "")
    if omp.isdigit() and int(omp) > 0 and not (launch.source == "torchrun" and omp == "1"):
        return int(omp)
    return share_of_cores(launch.rank, present)


def _join(
    config: Config,
    launch: Launch,
    device: torch.device,
    store: dist.Store,
    timeout: timedelta,
    store_holder: int | None,
) -> Topology:
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    expert = expert_ranks(config.parallel, launch.world_size)
    place = layout(launch.rank, launch.world_size, expert, config.parallel.tensor)

    meets_in_memory = config.runtime.shared_memory and device.type == "cpu"
    everyone = dist.group.WORLD
    assert everyone is not None

    def group(name: str, ranks: tuple[int, ...], backend: str | None = None) -> Group:
        # Every rank makes its own three groups in the same order; only their members take part.
        own, lane = ranks.index(launch.rank), None
        if meets_in_memory and len(ranks) > 1:
            keys = dist.PrefixStore(f"lane/{name}/{ranks[0]}", store)
            lane = open_lane(keys, own, len(ranks))
        if lane is None and backend is None and len(ranks) == launch.world_size:
            return Group(own, len(ranks), ranks, everyone)
        handle = dist.new_group(
            list(ranks),
            timeout=timeout,
            backend=backend if lane is None else SHARED_MEMORY,
            pg_options=lane,
            use_local_synchronization=True,
        )
        assert isinstance(handle, dist.ProcessGroup)
        return Group(own, len(ranks), ranks, handle)

    return Topology(
        world=Group(launch.rank, launch.world_size, tuple(range(launch.world_size)), everyone),
        expert=group("expert", place.expert),
        tensor=group("tensor", place.tensor),
        control=group("control", place.expert, "gloo"),
        data_rank=place.data_rank,
        num_data=place.num_data,
        replica=place.replica,
        num_replicas=place.num_replicas,
        device=device,
        store=store,
        local_rank=launch.local_rank,
        local_world_size=launch.local_world_size,
        host=socket.gethostname(),
        store_holder=store_holder,
    )
