"""Bootstrap: from one config on many processes to a `Topology`, the first thing that a rank does.

    discover    the launcher's environment -> rank, world size, address     (discovery.py)
    join        host, GPU, config digest and errors of all ranks            (rendezvous.py)
    create      device, CPU threads, process groups -> Topology             (process_groups.py)

An error is raised by every rank with the same text before a process group exists. So is one that
only one host has, such as a missing file (`broadcast_startup_error`).
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.config import Config
from engine.config.host_devices import LocalRank, VisibleGpus, find_gpus
from engine.config.loader import digest
from engine.config.preflight import read_num_experts
from engine.config.world_rules import expert_ranks, validate_world
from engine.distributed.address import check_address
from engine.distributed.discovery import Launch, discover
from engine.distributed.errors import RankError, RendezvousError, UnreportedError
from engine.distributed.groups import Topology
from engine.distributed.launch_agent import die_with_agent, kill_stopped_workers
from engine.distributed.process_groups import create_groups
from engine.distributed.rank_device import bind_to_gpu_cpus, use_gpu
from engine.distributed.rendezvous import RankInfo, assign_gpus, choose_device, join, share_of_cores

__all__ = ["RENDEZVOUS_TIMEOUT_S", "Launch", "discover", "start", "stop", "broadcast_startup_error"]

logger = logging.getLogger(__name__)
# For the other ranks to join one with a startup error; their imports may take that long.
RENDEZVOUS_TIMEOUT_S = 20.0


@contextmanager
def broadcast_startup_error(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Turn a ValueError that one rank raises before `start` into an error of every rank.

    The other ranks receive it in `start`, or here where they have one too.

    Raises:
        RankError: with the same text on every rank.
        UnreportedError: the others did not join within RENDEZVOUS_TIMEOUT_S.
    """
    try:
        yield
    except ValueError as error:
        launch, timeout = discover(environ), timedelta(seconds=RENDEZVOUS_TIMEOUT_S)
        die_with_agent(environ)
        own = _rank_info(launch, error=str(error))
        try:
            store = dist.PrefixStore("lockstep", _open_store(launch, timeout, environ))
            join(store, own, launch.world_size, timeout)  # raises the error
        except RankError as shared:
            raise shared from error
        except (RendezvousError, UnreportedError) as cause:
            raise UnreportedError(f"{error}\nThe other ranks do not know of it: {cause}") from error


def start(
    config: Config, environ: Mapping[str, str] = os.environ, *, is_watched: bool = False
) -> Topology:
    """Join the run that the launcher's environment describes; return its topology.

    Sets the CUDA device and torch's number of CPU threads. Collective over the world.

    Args:
        config: equal on every rank.
        environ: the launcher's environment.
        is_watched: a `Watchdog` ends the process when another rank fails, and NCCL's is not to.

    Raises:
        ValueError: with the same text on every rank.
        RendezvousError: ranks are missing.
    """
    if dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is already initialised in this process: one engine at a time; call "
            "close() on the first, or destroy_process_group()"
        )
    launch = discover(environ)
    die_with_agent(environ)
    timeout = timedelta(seconds=config.runtime.timeout_s)
    store = dist.PrefixStore("lockstep", _open_store(launch, timeout, environ))
    gpus = _visible_gpus(config, launch, environ)
    config, problem = _fit_world(config, launch)
    own = _rank_info(
        launch,
        digest=digest(config),
        gpu=None if gpus.index is None else gpus.ids[gpus.index],
        no_gpu=gpus.why_none,
        gpus=list(gpus.ids),
        error=problem,
    )
    try:
        return _join_run(config, launch, environ, store, own, is_watched)
    except RuntimeError:  # a rank has not joined, or has exited again
        kill_stopped_workers(environ)
        raise


def _rank_info(launch: Launch, **known: Any) -> RankInfo:
    """Return this rank's info; known: its fields that do not follow from the launch."""
    cores = sorted(os.sched_getaffinity(0))
    return RankInfo(rank=launch.rank, host=socket.gethostname(), cores=cores, **known)


def _join_run(
    config: Config,
    launch: Launch,
    environ: Mapping[str, str],
    store: dist.Store,
    own: RankInfo,
    is_watched: bool,
) -> Topology:
    """Pass the rendezvous, agree on the device, create the groups."""
    timeout = timedelta(seconds=config.runtime.timeout_s)
    infos, run = join(store, own, launch.world_size, timeout)
    store = dist.PrefixStore(run, store)  # it may outlive this run and hold another's keys
    infos = assign_gpus(infos)
    kind = choose_device(config.runtime.device, infos)
    if launch.rank == 0 and kind == "cpu" != config.runtime.device and any(i.gpu for i in infos):
        logger.warning("runtime.device = auto: running on CPU, not every rank has a GPU of its own")
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", own.gpus.index(infos[launch.rank].gpu or ""))
        use_gpu(device)
    num_threads = _num_threads(config, launch, environ, infos)
    if kind == "cuda" and config.runtime.numa == "auto":
        num_cpus = bind_to_gpu_cpus(device, launch.rank, infos)
        num_threads = min(num_threads, num_cpus or num_threads)
    torch.set_num_threads(num_threads)
    atexit.register(_let_gloo_finish)
    store_rank = None if _launcher_holds_store(environ) else 0
    return create_groups(config, launch, device, store, store_rank, is_watched)


def stop(topology: Topology) -> None:
    """Leave the run: destroy all process groups. Not collective; safe to call twice."""
    atexit.unregister(_let_gloo_finish)
    if dist.is_initialized():
        dist.destroy_process_group()
    for group in topology.groups:
        # Drop the last reference: gloo's destructor joins its threads (see _let_gloo_finish).
        object.__setattr__(group, "handle", None)


def _let_gloo_finish() -> None:
    """Yield the GIL at an exit without `stop`: gloo's threads need it to free their tensors.

    A thread that is about to do so when the interpreter ends aborts the process. Without this, that
    happens in one of eight exits that directly follow a collective.
    """
    time.sleep(0.05)


def _fit_world(config: Config, launch: Launch) -> tuple[Config, str | None]:
    """Return the config with `parallel.expert: auto` as a number, and what does not fit."""
    try:
        if config.parallel.expert == "auto":
            num_experts = read_num_experts(Path(config.model.path))
            size = expert_ranks(config.parallel, launch.world_size, num_experts)
            config = replace(config, parallel=replace(config.parallel, expert=size))
        validate_world(config, launch.world_size)
    except ValueError as error:
        return config, str(error)
    return config, None


def _open_store(launch: Launch, timeout: timedelta, environ: Mapping[str, str]) -> dist.Store:
    """Open the store that all ranks share; rank 0 holds it unless torchrun's agent does.

    Raises:
        UnreportedError: the rendezvous address is wrong; the other ranks may not know of it.
        RendezvousError: the store cannot be opened.
    """
    if launch.source == "single":
        return dist.HashStore()
    holds = launch.rank == 0 and not _launcher_holds_store(environ)
    if not _launcher_holds_store(environ):
        seconds = timeout.total_seconds()
        limit = min(seconds, RENDEZVOUS_TIMEOUT_S) if launch.rank == 0 else seconds
        check_address(launch.addr, launch.port, listens=holds, timeout_s=limit)
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
    """Return whether torchrun's agent holds the store, and not rank 0."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _visible_gpus(config: Config, launch: Launch, environ: Mapping[str, str]) -> VisibleGpus:
    """Return the GPUs that this rank sees; none where the config has it run on the CPU."""
    if config.runtime.device == "cpu":
        return VisibleGpus(why_none="none")
    return find_gpus(LocalRank(launch.local_rank, launch.local_world_size), environ)


def _num_threads(
    config: Config, launch: Launch, environ: Mapping[str, str], infos: list[RankInfo]
) -> int:
    """Return `runtime.threads`, else OMP_NUM_THREADS, else this rank's share of its host's cores.

    torchrun sets OMP_NUM_THREADS=1 by itself, so under torchrun a 1 counts as not set; so does a
    value that is no number of threads.
    """
    if config.runtime.threads is not None:
        return config.runtime.threads
    omp = environ.get("OMP_NUM_THREADS", "")
    usable = re.fullmatch("[0-9]{1,4}", omp) is not None and 0 < int(omp) <= 1024
    if usable and not (launch.source == "torchrun" and omp == "1"):
        return int(omp)
    return share_of_cores(launch.rank, infos)
