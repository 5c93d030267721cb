"""Loads whose counts stay on the device: the numbers of the counted way, read late.

Run: pytest tests/unit/moe/test_stats.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.moe.capacity.decision import DeviceDecision
from engine.moe.dispatch.chunk_layout import ExpertLayout
from engine.moe.placement.instances import Instances
from engine.moe.placement.placement import LayerPlacement
from engine.moe.router import Routing
from engine.moe.stats import LayerStats
from engine.profiling.telemetry import Telemetry


class Late:
    """Late loads that are read when the test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, Callable[[np.ndarray], None]]] = []

    def add(self, counts_N: torch.Tensor, record: Callable[[np.ndarray], None]) -> None:
        """Keep a call."""
        self.calls.append((counts_N, record))

    def read(self) -> None:
        """Record all calls."""
        for counts_N, record in self.calls:
            record(counts_N.numpy())


AFTER_WE = torch.tensor([[1, 0, 2, 1], [0, 3, 0, 1]])
BEFORE_WE = torch.tensor([[2, 0, 2, 1], [0, 5, 0, 1]])


def add(**limited: Any) -> tuple[Telemetry, Late]:
    late: Any = Late()
    telemetry = Telemetry()
    telemetry.loads.late = late
    ids_TK = torch.tensor([[0, 2], [2, 3]])
    weights_TK = torch.full((2, 2), 0.5)
    routing = Routing(torch.full((2, 4), 0.25), ids_TK, weights_TK)
    stats = LayerStats(7, Instances(LayerPlacement.contiguous(4, 2), 2), 1)
    decision = DeviceDecision(
        ids_TM=ids_TK,
        weights_TM=weights_TK,
        order=ExpertLayout([0, 2, 4], 1).sort(ids_TK),
        after_WE=AFTER_WE,
        **limited,
    )
    stats.add_on_device(telemetry, routing, decision, None)
    return telemetry, late


def test_loads_are_recorded_late_with_those_of_every_rank() -> None:
    telemetry, late = add()
    assert not telemetry.loads.layers
    late.read()
    load = telemetry.loads.layers[7]
    assert load.experts.tolist() == [1, 3, 2, 2]
    assert load.own_after.tolist() == [2, 2]
    assert load.own_experts == [2, 3]
    assert (load.slowest, load.slowest_after, load.mean_after) == (4, 4, 4)


def test_under_capacity_loads_before_and_after_it_differ() -> None:
    telemetry, late = add(before_WE=BEFORE_WE, non_finite_W=torch.tensor([0, 0]))
    late.read()
    load = telemetry.loads.layers[7]
    assert load.experts.tolist() == [2, 5, 2, 2]
    assert load.own_after.tolist() == [2, 2]
    assert (load.slowest, load.slowest_after) == (7, 4)


def test_scores_that_are_not_finite_end_the_run_when_they_are_read() -> None:
    _, late = add(before_WE=BEFORE_WE, non_finite_W=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="layer 7: router scores were NaN or infinite .* rank 1,"):
        late.read()
