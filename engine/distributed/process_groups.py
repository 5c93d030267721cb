"""Process groups: creates those of a run, in the same order on every rank.

On CUDA there are two sides. Tensors on the GPU travel over NCCL, at a high stream priority: at the
normal one a collective starts when the products queued before it have ended, and overlaps nothing.
What is on the host travels over gloo, or shared memory where the ranks are on one host, so that
neither waits for the other. On the CPU all groups of the same ranks are one.

A group of one rank never communicates and has no NCCL communicator.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from engine.config import Config
from engine.config.world_rules import expert_ranks
from engine.distributed.discovery import Launch
from engine.distributed.groups import Group, Topology, blocks, layout
from engine.distributed.shared_memory import BACKEND as SHARED_MEMORY
from engine.distributed.shared_memory import open_channel

_LOCAL = "use_local_synchronization"  # a group is created by its members alone


def create_groups(
    config: Config,
    launch: Launch,
    device: torch.device,
    store: dist.Store,
    store_rank: int | None,
    is_watched: bool = False,
) -> Topology:
    """Initialise torch.distributed and create the groups of the run.

    Collective over the world.

    Args:
        config: `parallel`, `runtime.timeout_s` and `runtime.shared_memory` of it.
        launch: this rank and the number of ranks.
        device: of this rank.
        store: of all ranks.
        store_rank: the rank whose process holds the store; None: the launcher does.
        is_watched: see `bootstrap.start`.
    """
    is_cuda = device.type == "cuda"
    if is_cuda:
        # 0: NCCL's own thread only logs that a collective has failed; 3: it ends the process, which
        # then leaves without a report. Read when a communicator is made; the user's choice counts.
        handling = "0" if is_watched and launch.world_size > 1 else "3"
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", handling)
    if is_cuda and launch.world_size == 1:
        # NCCL is used with this store everywhere; with the one in memory hardly anywhere.
        store = dist.TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=config.runtime.timeout_s))
    rank, size = launch.rank, launch.world_size
    make = _GroupMaker(
        rank,
        size,
        store,
        timedelta(seconds=config.runtime.timeout_s),
        backend="nccl" if is_cuda else "gloo",
        use_shared_memory=config.runtime.shared_memory,
    )
    world = Group(rank, size, tuple(range(size)), make.world(device))
    expert_size = expert_ranks(config.parallel, size)
    return _topology(
        make,
        world,
        (expert_size, config.parallel.tensor),
        device,
        local_world_size=launch.local_world_size,
        store_rank=store_rank,
    )


def create_groups_beside(
    device: torch.device,
    *,
    name: str,
    local_world_size: int,
    timeout: timedelta,
    use_shared_memory: bool = True,
) -> Topology:
    """Create the groups of a process in which another program has initialised torch.distributed.

    All its ranks are one expert group and one tensor group: every rank has the same tokens.
    Collective over the world.

    Args:
        device: of this rank's tensors.
        name: of this call, the same on every rank; no other call in these processes has it.
        local_world_size: ranks of this host.
        timeout: of a collective.
        use_shared_memory: as runtime.shared_memory.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore(f"lockstep/{name}", dist.distributed_c10d._get_default_store())
    backend = "nccl" if device.type == "cuda" else "gloo"
    make = _GroupMaker(rank, size, store, timeout, backend, use_shared_memory)
    world = dist.group.WORLD
    assert world is not None
    return _topology(
        make,
        Group(rank, size, tuple(range(size)), world),
        (size, size),
        device,
        local_world_size=local_world_size,
        store_rank=None,
    )


def _topology(
    make: _GroupMaker,
    world: Group,
    sizes: tuple[int, int],
    device: torch.device,
    *,
    local_world_size: int,
    store_rank: int | None,
) -> Topology:
    """Create the groups inside the world. Collective over it.

    Args:
        sizes: of expert and tensor groups.
        store_rank: see `Topology`.
    """
    expert_size, size, everyone = sizes[0], world.size, world.ranks
    own = layout(world.rank, size, *sizes)
    expert = make.group("expert", own.expert)
    tensor = make.group("tensor", own.tensor)
    control = make.group("control", own.expert, "gloo")
    counts, host_world, host_tensor = expert, world, tensor
    if device.type == "cuda":
        counts = make.group("counts", own.expert, separate=True)
        all_in_one = expert_size == size
        host_world = control if all_in_one else make.group("host_world", everyone, "gloo")
        host_tensor = make.group("host_tensor", own.tensor, "gloo")
    return Topology(
        world=world,
        expert=expert,
        tensor=tensor,
        control=control,
        counts=counts,
        host_world=host_world,
        host_tensor=host_tensor,
        data_rank=own.data_rank,
        num_data=own.num_data,
        replica=own.replica,
        device=device,
        store=make.store,
        local_world_size=local_world_size,
        host=socket.gethostname(),
        store_rank=store_rank,
    )


@dataclass(frozen=True, slots=True)
class _GroupMaker:
    """Creates process groups: every rank calls it for its own, in the same order."""

    rank: int
    world_size: int
    store: dist.Store
    timeout: timedelta
    backend: str  # of the device
    use_shared_memory: bool

    def world(self, device: torch.device) -> dist.ProcessGroup:
        """Initialise torch.distributed; return the group of all ranks."""
        dist.init_process_group(
            backend=self.backend,
            store=self.store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=self.timeout,
            device_id=device if device.type == "cuda" else None,
            pg_options=self._options(self.backend),
        )
        world = dist.group.WORLD
        assert world is not None
        return world

    def group(
        self,
        name: str,
        ranks: tuple[int, ...],
        backend: str | None = None,
        *,
        separate: bool = False,
    ) -> Group:
        """Create the group of `ranks`, in shared memory where host data can travel there.

        Args:
            name: no other group has it.
            ranks: one of the blocks of equal size that tile the world.
            backend: None: the device's, and the world's group where it has the same ranks.
            separate: do not take the world's group.
        """
        rank, size, channel = ranks.index(self.rank), len(ranks), None
        on_host = "gloo" in (backend, self.backend)
        if self.use_shared_memory and on_host and size > 1:
            keys = dist.PrefixStore(f"channel/{name}/{ranks[0]}", self.store)
            channel = open_channel(keys, rank, size)
        is_world = channel is None and backend is None and size == self.world_size
        if is_world and not (separate and size > 1):
            world = dist.group.WORLD
            assert world is not None
            return Group(rank, size, ranks, world)
        chosen = SHARED_MEMORY if channel is not None else backend or self.backend
        if size == 1:
            chosen = "gloo"
        handle = _new_group(
            ranks,
            blocks(self.world_size, size),
            backend=chosen,
            timeout=self.timeout,
            pg_options=channel or self._options(chosen),
        )
        return Group(rank, size, ranks, handle)

    @staticmethod
    def _options(backend: str) -> Any:
        """Return the options of a new group of this backend."""
        if backend != "nccl":
            return None
        return dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)


def _new_group(
    own: Sequence[int], all_groups: Sequence[Sequence[int]], **options: Any
) -> dist.ProcessGroup:
    """Create the group of the ranks `own`: by its members, or by all ranks where torch wants that.

    all_groups: the groups that are created by all ranks then, `own` among them.
    """
    try:
        handle = dist.new_group(list(own), use_local_synchronization=True, **options)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        if _LOCAL not in str(error):
            raise
        made = [dist.new_group(list(ranks), **options) for ranks in all_groups]
        handle = made[list(map(tuple, all_groups)).index(tuple(own))]
    assert isinstance(handle, dist.ProcessGroup)
    return handle
