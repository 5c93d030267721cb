"""Placements: where a scenario's experts and copies are.

From a file, or planned for the simulated loads themselves by the engine's own search. Long searches
are cut short where there are many experts and ranks, so a plan by `tools/plan_placement.py` may be
better than what is simulated here.

Legend: S steps, E experts.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from engine.moe.placement.placement import LayerPlacement, Placement
from engine.moe.placement.placement_file import read_placement
from engine.moe.placement.search import plan_layer
from engine.simulate.loads import Traffic
from engine.simulate.scenario import Scenario

_FULL_SEARCH = 32 * 8  # experts times ranks up to which the search is not cut short


class Placements:
    """The placements of all scenarios.

    Args:
        traffic: whose loads copies are planned for, as recorded.
        path: a placement file; None: none.
        seed: of the search.

    Raises:
        ValueError: the file is wrong, or of another model.
    """

    def __init__(self, traffic: Traffic, path: Path | None, seed: int) -> None:
        self._traffic, self._seed = traffic, seed
        self.file: Placement | None = None
        if path is not None:
            self.file = read_placement(path)
            trace = traffic.trace
            for name, own, other in (
                ("experts", self.file.num_experts, traffic.num_experts),
                ("model", self.file.fingerprint, trace.fingerprint if trace else None),
            ):
                if own != other and None not in (own, other):
                    raise ValueError(
                        f"--placement {path}: it has {name} {own}, the loads have {other}; give "
                        "loads and placement of one model"
                    )
        self._planned = lru_cache(maxsize=None)(self._plan)

    def layer(self, scenario: Scenario, place: int) -> LayerPlacement:
        """Return the placement of the layer at a place among the MoE layers.

        Raises:
            ValueError: the placement file is for another number of ranks.
        """
        size = scenario.expert_ranks
        if self.file is not None:
            if self.file.num_ranks != size:
                raise ValueError(
                    f"--placement: it is for {self.file.num_ranks} expert-parallel ranks, the "
                    f"scenario has {size}; plan again for them, or give --expert"
                )
            return self.file.layer(self._traffic.layers[place])
        if not scenario.copies:
            return LayerPlacement.contiguous(self._traffic.num_experts, size)
        return self._planned(size, scenario.copies, place)

    def _plan(self, num_ranks: int, copies: int, place: int) -> LayerPlacement:
        loads_SE = self._traffic.loads_SLE[:, place]
        size = self._traffic.num_experts * num_ranks
        return plan_layer(
            {self._traffic.name: loads_SE},
            num_ranks,
            num_copies=copies,
            seed=self._seed + place,
            effort=min(1.0, _FULL_SEARCH / size),
        )
