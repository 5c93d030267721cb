"""From every rank's totals to the run's report; the last collective of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.distributed.collectives import gather_objects
from engine.distributed.groups import Topology
from engine.loop import Totals
from engine.profiling.loads import LayerDrops, LoadCounter
from engine.profiling.report import LayerReport, LayerTotals, RankReport, RunReport
from engine.profiling.waiting import breakdown


@dataclass(slots=True)
class _Share:
    """What one rank hands in. after: layer -> first expert and rows of each of its experts.
    traffic: layer -> bytes sent, collectives called.
    """

    rank: RankReport
    replica: int
    latencies: dict[str, list[float]]
    seconds: float
    after: dict[int, tuple[int, list[int]]]
    drops: dict[int, LayerDrops]
    traffic: dict[int, tuple[int, int]]


def run_report(
    seconds: float,
    totals: Totals,
    latencies: dict[str, list[float]],
    loads: LoadCounter,
    topology: Topology,
    *,
    traffic: dict[int, tuple[int, int]],
    preemptions: int,
    drops: dict[int, LayerDrops],
) -> RunReport:
    """Gather every rank's totals into one report, the same on every rank of a replica; layers are
    of this rank's own group.

    traffic: layer -> bytes this rank sent to others, collectives it called. drops: layer -> what
    capacity did to this rank's own tokens. Collective over all ranks: every rank must call.
    """
    own = _Share(
        rank=RankReport(
            rank=topology.world.rank,
            host=topology.host,
            tokens_prefill=totals.tokens_prefill,
            tokens_decode=totals.tokens_decode,
            expert_rows=sum(int(load.own_after.sum()) for load in loads.layers.values()),
            bytes_sent=sum(sent for sent, _ in traffic.values()),
            num_collectives=sum(called for _, called in traffic.values()),
            preemptions=preemptions,
            seconds=breakdown(totals.phase_seconds, totals.waiting_seconds),
        ),
        replica=topology.replica,
        latencies=latencies,
        seconds=seconds,
        after={
            layer: (load.first_expert, load.own_after.tolist())
            for layer, load in loads.layers.items()
        },
        drops=drops,
        traffic=traffic,
    )
    everyone: list[_Share] = gather_objects(own, topology.world)
    group = [share for share in everyone if share.replica == topology.replica]
    layers = _layers(loads, group)
    return RunReport(
        seconds=max(share.seconds for share in everyone),
        steps=totals.steps,
        ranks=[share.rank for share in everyone],
        layers=layers,
        max_over_mean=loads.max_over_mean(),
        max_over_mean_after=loads.max_over_mean_after(),
        speed_bound=loads.speed_bound(),
        totals=_totals(layers, group, totals.steps),
        latencies={
            key: [value for share in everyone for value in share.latencies[key]]
            for key in latencies
        },
    )


def _layers(loads: LoadCounter, group: Sequence[_Share]) -> list[LayerReport]:
    reports = []
    for layer, load in sorted(loads.layers.items()):
        after = np.zeros_like(load.experts)
        drops = LayerDrops()
        for share in group:
            first, rows = share.after[layer]
            after[first : first + len(rows)] += rows
            drops.add(share.drops.get(layer, LayerDrops()))
        reports.append(
            LayerReport(
                layer=layer,
                rank_max_over_mean=load.max_over_mean,
                rank_max_over_mean_after=load.max_over_mean_after,
                expert_max_over_mean=_max_over_mean(load.experts),
                expert_max_over_mean_after=_max_over_mean(after),
                expert_loads=load.experts.tolist(),
                expert_loads_after=after.tolist(),
                assignments=drops.routed,
                dropped=drops.dropped,
                added=drops.added,
                orphans=drops.orphans,
                gate_mass_kept=_ratio(drops.mass_kept, drops.mass, nothing=1.0),
                drop_rate=_ratio(drops.dropped, drops.routed, nothing=0.0),
                bytes_sent=sum(share.traffic[layer][0] for share in group),
                num_collectives=group[0].traffic[layer][1],
            )
        )
    return reports


def _totals(layers: list[LayerReport], group: Sequence[_Share], steps: int) -> LayerTotals:
    """Every layer runs once a step, on ranks without tokens too."""
    drops = LayerDrops()
    for share in group:
        for of_layer in share.drops.values():
            drops.add(of_layer)
    calls = steps * len(layers)
    return LayerTotals(
        assignments=drops.routed,
        dropped=drops.dropped,
        added=drops.added,
        orphans=drops.orphans,
        gate_mass_kept=_ratio(drops.mass_kept, drops.mass, nothing=1.0),
        drop_rate=_ratio(drops.dropped, drops.routed, nothing=0.0),
        bytes_sent=sum(layer.bytes_sent for layer in layers),
        collectives_per_call=_ratio(
            sum(layer.num_collectives for layer in layers), calls, nothing=0.0
        ),
    )


def _ratio(part: float, whole: float, *, nothing: float) -> float:
    """part / whole, or `nothing` where there is no whole."""
    return part / whole if whole else nothing


def _max_over_mean(loads_E: np.ndarray) -> float:
    return float(loads_E.max() / loads_E.mean()) if loads_E.any() else 1.0
