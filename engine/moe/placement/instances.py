"""Instances: the numbers of what a layer's ranks hold, homes and copies alike.

An *instance* is an expert's weights on one rank. Instances are numbered rank by rank, in a rank the
homes by expert and then the copies by expert, so that the dispatch has one contiguous range per
rank. Experts in *home order* are numbered by the rank of their home, then by expert, so that the
capacity policies have contiguous ranges too. Both are the experts' own numbers where homes are
contiguous and there are no copies.

Worked example, 4 experts on 2 ranks, homes 0 1 0 1, a copy of expert 3 on rank 0:
    home order   experts 0 2 | 1 3
    instances    rank 0: experts 0 2, copy of 3 | rank 1: experts 1 3
    first_instances [0, 3, 5], first_homes [0, 2, 4]

Legend: E experts, I instances, H most hosts of an expert, W expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from engine.moe.placement.placement import LayerPlacement
from engine.ops.to_device import to_device


class Instances:
    """The instances of one layer.

    Args:
        placement: of the layer.
        num_ranks: W.
        copies: the experts that each rank holds copies of, in the order of its instances; None: by
            expert.
    """

    expert_I: np.ndarray  # int64, the expert of each instance
    rank_I: np.ndarray  # int64, its rank
    is_home_I: np.ndarray  # bool
    first_instances: list[int]  # W + 1 boundaries of the ranks' instances
    first_homes: list[int]  # W + 1 boundaries of the ranks' homes in home order
    expert_of_home_E: np.ndarray  # int64, the experts in home order
    home_order_E: np.ndarray  # int64, the place of each expert in home order
    home_instance_E: np.ndarray  # int64, by home order: the instance of the expert's home
    hosts_EH: np.ndarray  # int64, by home order: instances of the home, then of the copies by rank;
    # -1 where there are fewer

    def __init__(
        self,
        placement: LayerPlacement,
        num_ranks: int,
        copies: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.placement = placement
        self.num_ranks, self.num_experts = num_ranks, len(placement.home_E)
        homes: list[list[int]] = [[] for _ in range(num_ranks)]
        for expert, home in enumerate(placement.home_E):
            homes[home].append(expert)
        if copies is None:
            copies = [
                [expert for expert, ranks in enumerate(placement.copies_E) if rank in ranks]
                for rank in range(num_ranks)
            ]
        self.copies = [list(each) for each in copies]
        held = [own + further for own, further in zip(homes, self.copies, strict=True)]
        self.expert_I = np.array([expert for each in held for expert in each], dtype=np.int64)
        self.rank_I = np.repeat(np.arange(num_ranks), list(map(len, held)))
        self.is_home_I = np.array(
            [
                index < len(own)
                for own, each in zip(homes, held, strict=True)
                for index in range(len(each))
            ],
            dtype=bool,
        )
        self.first_instances = list(accumulate(map(len, held), initial=0))
        self.first_homes = list(accumulate(map(len, homes), initial=0))
        self.expert_of_home_E = np.array([e for own in homes for e in own], dtype=np.int64)
        self.home_order_E = np.empty(self.num_experts, dtype=np.int64)
        self.home_order_E[self.expert_of_home_E] = np.arange(self.num_experts)
        self.home_instance_E = np.flatnonzero(self.is_home_I)
        self.num_instances = len(self.expert_I)
        self.has_copies = self.num_instances > self.num_experts
        self.has_contiguous_homes = bool(
            (self.expert_of_home_E == np.arange(self.num_experts)).all()
        )
        most = 1 + max((len(each) for each in placement.copies_E), default=0)
        self.hosts_EH = np.full((self.num_experts, most), -1, dtype=np.int64)
        self.hosts_EH[:, 0] = self.home_instance_E
        found = [1] * self.num_experts
        for instance in np.flatnonzero(~self.is_home_I).tolist():
            place = int(self.home_order_E[self.expert_I[instance]])
            self.hosts_EH[place, found[place]] = instance
            found[place] += 1
        self._tables: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    def with_copies(self, copies: Sequence[Sequence[int]]) -> Instances:
        """Return the same homes with other copies on each rank, in the order of its instances."""
        ranks: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, held in enumerate(copies):
            for expert in held:
                ranks[expert].append(rank)
        copies_E = tuple(tuple(sorted(each)) for each in ranks)
        placement = LayerPlacement(self.placement.home_E, copies_E)
        return Instances(placement, self.num_ranks, copies)

    def num_homes(self, rank: int) -> int:
        """Return the experts whose home is a rank."""
        return self.first_homes[rank + 1] - self.first_homes[rank]

    def num_local(self, rank: int) -> int:
        """Return the instances of a rank."""
        return self.first_instances[rank + 1] - self.first_instances[rank]

    def local_experts(self, rank: int) -> list[int]:
        """Return the experts of a rank's instances: the homes, then the copies."""
        own = slice(self.first_instances[rank], self.first_instances[rank + 1])
        return self.expert_I[own].tolist()

    @property
    def most_local(self) -> int:
        """Instances of the rank that has most."""
        return int(np.diff(self.first_instances).max())

    @property
    def most_homes(self) -> int:
        """Homes of the rank that has most."""
        return int(np.diff(self.first_homes).max())

    def to_home_order(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Return experts' numbers as places in home order; -1 stays."""
        return ids_TK if self.has_contiguous_homes else self._table(ids_TK.device)[0][ids_TK]

    def experts_in_home_order(self, x_TE: torch.Tensor) -> torch.Tensor:
        """Return columns by expert as columns in home order."""
        return x_TE if self.has_contiguous_homes else x_TE[:, self._table(x_TE.device)[1]]

    def homes(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Return the instances of experts' homes, in home order where there are no copies; -1
        stays.
        """
        if self.has_contiguous_homes and not self.has_copies:
            return ids_TK
        return self._table(ids_TK.device)[2][ids_TK]

    def host_table(self, device: torch.device) -> torch.Tensor:
        """Return the instances of every expert's hosts by home order, int64 [E, H + 1]: the home,
        the copies by rank, and -1 behind the last.
        """
        return self._table(device)[3]

    def host_table_of_homes(self, device: torch.device) -> torch.Tensor:
        """Return `host_table` with a row per instance instead, that of its expert at the home."""
        return self._table(device)[5]

    def experts(self, ids_TM: torch.Tensor) -> torch.Tensor:
        """Return the model's experts of instances; expert 0 where the instance is -1."""
        return self._table(ids_TM.device)[6][ids_TM]

    def is_copy(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """Return which instances are copies, bool; not -1."""
        return self._table(ids_TK.device)[4][ids_TK]

    def fold(self, x_WI: np.ndarray) -> np.ndarray:
        """Return numbers by instance summed by expert, in home order, int64 [W, E]."""
        x_WE = np.zeros((len(x_WI), self.num_experts), dtype=np.int64)
        np.add.at(x_WE.T, self.home_order_E[self.expert_I], x_WI.T)
        return x_WE

    def by_expert(self, x_E: np.ndarray) -> np.ndarray:
        """Return numbers in home order (the last dimension) as numbers by expert."""
        return x_E if self.has_contiguous_homes else x_E[..., self.home_order_E]

    def _table(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return the place of every expert and -1 at the end, the experts in home order, the
        instance of every expert's home and -1 at the end, `host_table`, whether an instance is a
        copy, `host_table_of_homes`, and the expert of every instance and 0 at the end.
        """
        if device not in self._tables:
            hosts_EH1 = np.pad(self.hosts_EH, ((0, 0), (0, 1)), constant_values=-1)
            hosts_IH1 = np.full((self.num_instances, hosts_EH1.shape[1]), -1, dtype=np.int64)
            hosts_IH1[self.home_instance_E] = hosts_EH1
            tables = (
                np.append(self.home_order_E, -1),
                self.expert_of_home_E,
                np.append(self.home_instance_E[self.home_order_E], -1),
                hosts_EH1,
                np.append(~self.is_home_I, False),
                hosts_IH1,
                np.append(self.expert_I, 0),
            )
            self._tables[device] = tuple(
                to_device(torch.from_numpy(np.ascontiguousarray(each)), device) for each in tables
            )
        return self._tables[device]
