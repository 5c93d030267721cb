"""Causes by layer: the wait per cause in each layer. Pure; part of the straggler analysis.

`straggler_causes.py` splits the wait that a rank caused over the whole run, where its statistics
are good. Here each of those amounts is distributed over the layers in proportion to a measure:

    device   the rank's own compute in the layer, at most the wait it caused there
    load     the excess of the most loaded rank's rows, at most the wait it caused at the combine
    tokens   the wait it caused at other collectives
    host     the rest of the wait it caused
    network  the transfer time in the layer

Legend: L layers + 1 (the first row is outside of the layers), P phases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.profiling.collector import PhaseTotals, WaitAttribution
from engine.profiling.phase_clock import Phase

_COMPUTE = (Phase.ATTENTION, Phase.GATE, Phase.PLAN, Phase.OTHER, Phase.EXPERTS)
_TRANSFER = (Phase.DISPATCH, Phase.COMBINE, Phase.CONSENSUS, Phase.TENSOR)


def causes_by_layer(
    totals: Sequence[PhaseTotals],
    waits_caused: Sequence[Mapping[str, float]],
    attribution: WaitAttribution,
    imbalance_L: np.ndarray,
    network: float,
) -> list[dict[str, float]]:
    """Return cause -> seconds of a mean rank, for each decoder layer.

    Summed over the layers and what is outside of them, each cause has the sum of `waits_caused`.

    Args:
        totals: of every rank of the group, in order.
        waits_caused: cause -> seconds, of every rank, in order.
        attribution: where each rank caused them.
        imbalance_L: float64 [L], as in `straggler_causes.analyse`.
        network: seconds of transfer of the whole run.
    """
    seconds_WLP = np.stack([item.seconds for item in totals])
    excess_L = seconds_WLP[:, :, Phase.EXPERTS].mean(0) * (imbalance_L - 1)
    found: dict[str, np.ndarray] = {
        cause: np.zeros(len(imbalance_L)) for cause in ("load", "tokens", "device", "host")
    }
    for index, caused in enumerate(waits_caused):
        wait_L = attribution.seconds[index].sum(1)
        combine_L = attribution.seconds[index][:, Phase.COMBINE]
        compute_L = seconds_WLP[index][:, list(_COMPUTE)].sum(1)
        device_L = _distribute(caused["device"], np.minimum(wait_L, compute_L), wait_L)
        load_L = _distribute(caused["load"], np.minimum(combine_L, excess_L), wait_L)
        tokens_L = _distribute(caused["tokens"], wait_L - combine_L, wait_L)
        rest_L = wait_L - device_L - load_L - tokens_L
        host_L = _distribute(caused["host"], rest_L, wait_L)
        for cause, part_L in zip(found, (load_L, tokens_L, device_L, host_L), strict=True):
            found[cause] += part_L
    # Transfer: what was not waiting, where bytes were sent at all.
    sent = [(item.seconds - item.waiting) * (item.num_bytes > 0) for item in totals]
    transfer_L = np.mean([each[:, list(_TRANSFER)].sum(1) for each in sent], axis=0)
    found["network"] = _distribute(network, transfer_L, transfer_L)
    return [
        {cause: float(part_L[layer]) for cause, part_L in found.items()}
        for layer in range(1, len(imbalance_L))
    ]


def _distribute(amount: float, weights_L: np.ndarray, otherwise_L: np.ndarray) -> np.ndarray:
    """Split an amount in proportion to weights, of which negative ones count as 0; if all are 0, in
    proportion to `otherwise_L`.
    """
    for each_L in (np.maximum(weights_L, 0.0), np.maximum(otherwise_L, 0.0)):
        if (total := float(each_L.sum())) > 0:
            return amount * each_L / total
    return np.zeros(len(weights_L))
