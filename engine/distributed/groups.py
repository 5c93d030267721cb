"""Process groups of one run and the arithmetic of who holds what.

Stands between `bootstrap`, which creates the groups once, and everything that communicates.
The layout is fixed: ranks of a tensor group are consecutive, expert groups are consecutive blocks
of `parallel.expert` ranks, and each such block holds one full copy (replica) of the model:

    world 8, expert 4, tensor 2     replica 0: ranks 0 1 2 3      replica 1: ranks 4 5 6 7
    tensor groups (0 1) (2 3) (4 5) (6 7)    data ranks 0 0 1 1 2 2 3 3
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Group:
    """A process group and this rank's place in it; `ranks` are global, `rank` counts inside."""

    rank: int
    size: int
    ranks: tuple[int, ...]
    handle: dist.ProcessGroup


@dataclass(frozen=True, slots=True)
class Topology:
    """Everything a rank knows about its run; made by `bootstrap.start`, never changed.

    `control` is a group over the ranks of `expert` for words and objects on the host.
    Requests are owned by data ranks: the ranks of one tensor group share a `data_rank`. The process
    of rank `store_holder` holds the store; None where the launcher does.
    """

    world: Group
    expert: Group
    tensor: Group
    control: Group
    data_rank: int
    num_data: int
    replica: int
    num_replicas: int
    device: torch.device
    store: dist.Store
    local_rank: int
    local_world_size: int
    host: str
    store_holder: int | None = None

    @property
    def tensor_rank_offsets(self) -> range:
        """Where in `expert` the ranks of `tensor` stand."""
        first = self.expert.ranks.index(self.tensor.ranks[0])
        return range(first, first + self.tensor.size)


@dataclass(frozen=True, slots=True)
class Layout:
    """One rank's groups as global ranks: the part of `Topology` known before any group exists."""

    expert: tuple[int, ...]
    tensor: tuple[int, ...]
    data_rank: int
    num_data: int
    replica: int
    num_replicas: int


def layout(rank: int, world_size: int, expert: int, tensor: int) -> Layout:
    """Progress `rank` in its expert and tensor groups, of sizes `expert` and `tensor`.

    The sizes must tile the world, which `config_world.validate_world` has checked.
    """
    assert 0 <= rank < world_size and world_size % expert == 0 and expert % tensor == 0
    replica, data_rank = rank // expert, rank // tensor
    return Layout(
        expert=tuple(range(replica * expert, (replica + 1) * expert)),
        tensor=tuple(range(data_rank * tensor, (data_rank + 1) * tensor)),
        data_rank=data_rank,
        num_data=world_size // tensor,
        replica=replica,
        num_replicas=world_size // expert,
    )


def expert_range(num_experts: int, size: int, rank: int) -> tuple[int, int]:
    """First expert and number of experts that `rank` of an expert group of `size` holds.

    Contiguous; the remainder is spread over the first ranks: 7 experts on 3 ranks are
    (0, 3), (3, 2), (5, 2). A rank holds none when there are fewer experts than ranks.
    """
    assert num_experts > 0 and 0 <= rank < size
    quotient, remainder = divmod(num_experts, size)
    return rank * quotient + min(rank, remainder), quotient + (rank < remainder)
