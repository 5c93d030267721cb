"""Placement: the home of every expert and the ranks that hold a copy of it, layer by layer.

An expert's *home* is the rank with its weights in the model's precision. A *copy* is a further rank
that holds the expert too, in the model's precision or a lower one. Without a placement file homes
are contiguous and there are no copies. `placement_file.py` reads and writes a placement,
`instances.py` numbers what a layer's ranks hold.

Worked example, 4 experts on 2 ranks: homes 0 0 1 1, and a copy of expert 3 on rank 0: its rows may
be computed by rank 1 and by rank 0.

Legend: E experts, W expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.distributed.groups import expert_range

_FASTEST = 1024  # the speed of the fastest rank, in whole numbers

COPY_GROUP = 32  # input columns of low-bit copies that share a scale, a float32

Precision = Literal["model", "int8", "int4"]  # of copies; model: that of the homes


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """Where the experts of one layer are."""

    home_E: tuple[int, ...]  # the rank of each expert's home
    copies_E: tuple[tuple[int, ...], ...]  # further ranks of each expert, ascending

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> LayerPlacement:
        """Return contiguous homes, the remainder on the first ranks, and no copies."""
        homes = [
            rank
            for rank in range(num_ranks)
            for _ in range(expert_range(num_experts, num_ranks, rank)[1])
        ]
        return cls(tuple(homes), ((),) * num_experts)

    @property
    def num_copies(self) -> int:
        """Copies of all experts."""
        return sum(map(len, self.copies_E))

    def hosts(self, expert: int) -> tuple[int, ...]:
        """Return the ranks of an expert: its home, then its copies."""
        return (self.home_E[expert], *self.copies_E[expert])

    def problems(self, num_ranks: int) -> list[str]:
        """Return what is wrong with it on so many ranks, a sentence for each."""
        found: list[str] = []
        if len(self.copies_E) != len(self.home_E):
            found.append(f"{len(self.home_E)} homes and copies of {len(self.copies_E)} experts")
            return found
        for expert, (home, copies) in enumerate(zip(self.home_E, self.copies_E, strict=True)):
            for rank in (home, *copies):
                if not 0 <= rank < num_ranks:
                    found.append(f"expert {expert} is on rank {rank}, of {num_ranks} ranks")
            if len({home, *copies}) != 1 + len(copies):
                found.append(
                    f"expert {expert} is twice on one rank: home {home}, copies {list(copies)}"
                )
        if empty := sorted(set(range(num_ranks)) - set(self.home_E)):
            found.append(f"rank {empty[0]} is the home of no expert")
        return found


@dataclass(frozen=True, slots=True)
class PlannedLoads:
    """The loads of one domain of traffic that a plan was made for."""

    share: float  # of perfect balance, over all layers: what the plan promises for these loads
    layer_shares: Mapping[int, float]  # the same per layer
    loads_E: Mapping[int, tuple[int, ...]]  # mean rows of each expert per step, per layer


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the experts of a model are; part of a job, and the same on all ranks.

    A layer that it does not name has contiguous homes and no copies.
    """

    num_ranks: int
    num_experts: int
    layers: Mapping[int, LayerPlacement]  # by layer index
    precision: Precision = "model"
    fingerprint: str | None = None  # of the model that it was made for; None: any
    domains: Mapping[str, PlannedLoads] = field(default_factory=dict)  # what it was planned for
    # Time per row of each rank over the fastest's, as planned; empty: equal ranks.
    row_times_W: Sequence[float] = ()

    def layer(self, index: int) -> LayerPlacement:
        """Return the placement of a layer."""
        if index in self.layers:
            return self.layers[index]
        return LayerPlacement.contiguous(self.num_experts, self.num_ranks)

    @property
    def speeds_W(self) -> tuple[int, ...] | None:
        """Whole numbers in the ratio of the ranks' speeds; None where they are equal."""
        times = self.row_times_W
        if not times or min(times) == max(times):
            return None
        return tuple(max(1, round(_FASTEST * min(times) / time)) for time in times)

    @property
    def num_copies(self) -> int:
        """Copies of all layers."""
        return sum(layer.num_copies for layer in self.layers.values())
