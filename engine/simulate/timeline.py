"""Timeline: seconds of a layer from every rank's tokens, rows and bytes.

Ranks wait for each other three times per layer: when they agree, when rows are dispatched and when
results are combined. So a layer takes the slowest rank's attention, gate and plan; the consensus;
the dispatch; the slowest rank's experts; the combine. Chunks that overlap are not modelled.

Legend: W expert-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.simulate.cost_model import CostModel, Hop, makespan
from engine.simulate.exchanges import Exchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """Seconds of one layer of one step."""

    seconds: float
    local: float  # attention, gate and plan of the slowest rank
    consensus: float
    dispatch: float
    experts: float  # of the slowest rank
    combine: float
    waiting: float  # of the mean rank, for slower ones


def layer_time(
    costs: CostModel,
    tokens_W: np.ndarray,
    rows: list[np.ndarray],
    exchanged: Exchanged,
    slowness_W: np.ndarray,
    ranks_per_node: int,
) -> LayerTime:
    """Return the seconds of a layer.

    Args:
        costs: of the model on the device.
        tokens_W: int64, of each rank.
        rows: int64, of each expert and copy of each rank.
        exchanged: by the ranks.
        slowness_W: float64, what each rank's own work takes over that of the device.
        ranks_per_node: ranks that share a node.
    """
    local_W = costs.attention.of(tokens_W) + costs.gate.of(tokens_W) + costs.plan.of(tokens_W)
    local_W = local_W * slowness_W
    experts_W = np.array([costs.experts.of(rows_e) for rows_e in rows]) * slowness_W
    local, experts = (
        makespan(each_W, ranks_per_node, costs.cores) for each_W in (local_W, experts_W)
    )
    size = len(tokens_W)
    consensus = dispatch = combine = 0.0
    if size > 1:
        near = (min(ranks_per_node, size) - 1) / (size - 1)
        consensus = _hop(
            costs.consensus,
            costs.network,
            exchanged.consensus_bytes * near,
            exchanged.consensus_bytes * (1 - near),
        )
        dispatch = _hop(
            costs.dispatch,
            costs.network,
            exchanged.near_bytes,
            exchanged.far_bytes,
            float(exchanged.sent_W.max()),
        )
        combine = _hop(
            costs.combine,
            costs.network,
            exchanged.near_back_bytes,
            exchanged.far_back_bytes,
            float(exchanged.load_W.max()),
        )
    seconds = max(local + consensus + dispatch + experts + combine, costs.host)
    waiting = local - float(local_W.mean()) + experts - float(experts_W.mean())
    return LayerTime(
        seconds=seconds,
        local=local,
        consensus=consensus,
        dispatch=dispatch,
        experts=experts,
        combine=combine,
        waiting=waiting,
    )


def _hop(link: Hop, network: Hop | None, near: float, far: float, rows: float = 0.0) -> float:
    """Return the seconds of a collective: rows within nodes and beyond travel side by side."""
    if not far or network is None:
        return link.of(near + far, rows)
    return max(link.of(near, rows), network.of(far))
