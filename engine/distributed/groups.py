"""Process groups of one run, and the arithmetic of which rank owns what.

`bootstrap.py` creates the groups once; everything that communicates uses them. The layout is fixed:
ranks of a tensor group are consecutive, expert groups are consecutive blocks of `parallel.expert`
ranks, and each such block holds one full copy (replica) of the model:

    world 8, expert 4, tensor 2     replica 0: ranks 0 1 2 3      replica 1: ranks 4 5 6 7
    tensor groups (0 1) (2 3) (4 5) (6 7)    data ranks 0 0 1 1 2 2 3 3
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Link:
    """What communication of a group costs, as measured at start (`link.py`)."""

    latency_s: float  # of a small all-to-all
    bytes_per_s: float  # that a rank sends in a large one
    launch_s: float  # of a small kernel, host and device

    @property
    def collective_bytes(self) -> float:
        """Bytes that could be sent in the time of one more small collective."""
        return self.latency_s * self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Group:
    """A process group, as seen by one of its ranks."""

    rank: int  # of this process, within the group
    size: int
    ranks: tuple[int, ...]  # global ranks of the members
    handle: dist.ProcessGroup
    link: Link | None = None  # None: not measured


@dataclass(frozen=True, slots=True)
class Topology:
    """The groups, device and store of one rank; constant for the whole run."""

    world: Group
    expert: Group
    tensor: Group
    control: Group  # the ranks of `expert`, for host data
    counts: Group  # the ranks of `expert`, for row counts and claims: they do not queue behind rows
    host_world: Group  # the ranks of `world`, for host data
    host_tensor: Group  # the ranks of `tensor`, for host data
    data_rank: int  # owns requests; shared by the ranks of one tensor group
    num_data: int
    replica: int
    device: torch.device
    store: dist.Store
    local_world_size: int
    host: str
    store_rank: int | None = None  # its process holds the store; None: the launcher does

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups; some may share a process group."""
        own = (self.world, self.expert, self.tensor, self.control)
        return (*own, self.counts, self.host_world, self.host_tensor)

    @property
    def tensor_rank_offsets(self) -> range:
        """Positions within `expert` of the ranks of `tensor`."""
        first = self.expert.ranks.index(self.tensor.ranks[0])
        return range(first, first + self.tensor.size)


def blocks(world_size: int, size: int) -> list[tuple[int, ...]]:
    """Return the groups of `size` consecutive ranks that tile the world."""
    return [tuple(range(first, first + size)) for first in range(0, world_size, size)]


@dataclass(frozen=True, slots=True)
class Layout:
    """The part of a rank's `Topology` that is known before any group exists."""

    expert: tuple[int, ...]  # global ranks
    tensor: tuple[int, ...]  # global ranks
    data_rank: int
    num_data: int
    replica: int


def layout(rank: int, world_size: int, expert: int, tensor: int) -> Layout:
    """Return the groups of global rank `rank`, for groups of sizes `expert` and `tensor`.

    The sizes must tile the world, as `config/world_rules.py` validates.
    """
    assert 0 <= rank < world_size and world_size % expert == 0 and expert % tensor == 0
    replica, data_rank = rank // expert, rank // tensor
    return Layout(
        expert=tuple(range(replica * expert, (replica + 1) * expert)),
        tensor=tuple(range(data_rank * tensor, (data_rank + 1) * tensor)),
        data_rank=data_rank,
        num_data=world_size // tensor,
        replica=replica,
    )


def expert_range(num_experts: int, size: int, rank: int) -> tuple[int, int]:
    """Return the first expert and the number of experts of `rank` in an expert group of `size`.

    Contiguous; the remainder is spread over the first ranks: 7 experts on 3 ranks are
    (0, 3), (3, 2), (5, 2). A rank holds none when there are fewer experts than ranks.
    """
    assert num_experts > 0 and 0 <= rank < size
    quotient, remainder = divmod(num_experts, size)
    return rank * quotient + min(rank, remainder), quotient + (rank < remainder)
