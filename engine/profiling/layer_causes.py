"""By layer: what the group lost to each cause in it. Pure; part of the straggler analysis.

`straggler.py` splits a rank's charge by cause over the whole run, where its statistics are good.
Here each of those amounts is dealt out to the layers in proportion to what the layer shows of it:

    device   the rank's own compute there, as far as it was charged for coming late
    load     the excess of the most loaded rank's rows, as far as it came late to the combine
    tokens   what it was charged before the combine
    host     what is left of its charge
    network  the time that bytes travelled there

Legend: L layers + 1 (the first row is outside of the layers), P phases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from engine.profiling.collector import Charges, PhaseTotals
from engine.profiling.phase_clock import Phase

_COMPUTE = (Phase.ATTENTION, Phase.GATE, Phase.PLAN, Phase.OTHER, Phase.EXPERTS)
_TRAVEL = (Phase.DISPATCH, Phase.COMBINE, Phase.CONSENSUS, Phase.TENSOR)


class LayerWaits(Protocol):
    """What is used of `straggler.RankAttribution`."""

    @property
    def lost(self) -> Mapping[str, float]:
        """Seconds by cause."""
        ...


def causes_by_layer(
    totals: Sequence[PhaseTotals],
    blames: Sequence[LayerWaits],
    charges: Charges,
    imbalance_L: np.ndarray,
    network: float,
) -> list[dict[str, float]]:
    """Return seconds lost by cause in each decoder layer, a mean rank's.

    totals, blames: of every rank of the group, in order. imbalance_L: float64 [L], as in `analyse`.
    network: seconds lost to it in all. Summed over the layers and what is outside of them, each
    cause comes to what the ranks are blamed for.
    """
    seconds_WLP = np.stack([item.seconds for item in totals])
    excess_L = seconds_WLP[:, :, Phase.EXPERTS].mean(0) * (imbalance_L - 1)
    found: dict[str, np.ndarray] = {
        cause: np.zeros(len(imbalance_L)) for cause in ("load", "tokens", "device", "host")
    }
    for index, blame in enumerate(blames):
        charge_LP = charges.seconds[index]
        charge_L, late_L = charge_LP.sum(1), charge_LP[:, Phase.COMBINE]
        compute_L = seconds_WLP[index][:, list(_COMPUTE)].sum(1)
        device_L = _dealt(blame.lost["device"], np.minimum(charge_L, compute_L), charge_L)
        load_L = _dealt(blame.lost["load"], np.minimum(late_L, excess_L), charge_L)
        tokens_L = _dealt(blame.lost["tokens"], charge_L - late_L, charge_L)
        rest_L = charge_L - device_L - load_L - tokens_L
        host_L = _dealt(blame.lost["host"], rest_L, charge_L)
        for cause, part_L in zip(found, (load_L, tokens_L, device_L, host_L), strict=True):
            found[cause] += part_L
    moved = [(item.seconds - item.waiting) * (item.num_bytes > 0) for item in totals]
    travel_L = np.mean([each[:, list(_TRAVEL)].sum(1) for each in moved], axis=0)
    found["network"] = _dealt(network, travel_L, travel_L)
    return [
        {cause: float(part_L[layer]) for cause, part_L in found.items()}
        for layer in range(1, len(imbalance_L))
    ]


def _dealt(amount: float, weights_L: np.ndarray, otherwise_L: np.ndarray) -> np.ndarray:
    """An amount in proportion to weights, negative ones counting as none; where there are none, to
    other ones.
    """
    for each_L in (np.maximum(weights_L, 0.0), np.maximum(otherwise_L, 0.0)):
        if (total := float(each_L.sum())) > 0:
            return amount * each_L / total
    return np.zeros(len(weights_L))
