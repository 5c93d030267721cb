"""From every rank's totals to the run's report; the last collective of a run."""

from __future__ import annotations

from collections.abc import Sequence

from engine.distributed.collectives import gather_objects
from engine.distributed.groups import Topology
from engine.loop import Totals
from engine.moe.layer import MoELayer
from engine.profiling.loads import LoadCounter
from engine.profiling.report import LayerReport, RankReport, RunReport
from engine.profiling.waiting import breakdown


def run_report(
    seconds: float,
    totals: Totals,
    latencies: dict[str, list[float]],
    loads: LoadCounter,
    moe_layers: Sequence[MoELayer],
    topology: Topology,
    *,
    bytes_sent: int,
    preemptions: int,
) -> RunReport:
    """Gather every rank's totals into one report, the same on every rank; layers are of this rank's
    own group.

    Collective over all ranks: every rank must call.
    """
    first, count = 0, 0
    for layer in moe_layers:
        first, count = layer.first_expert, layer.num_local_experts  # the same in every layer
    rows = sum(int(load.experts[first : first + count].sum()) for load in loads.layers.values())
    own = RankReport(
        rank=topology.world.rank,
        host=topology.host,
        tokens_prefill=totals.tokens_prefill,
        tokens_decode=totals.tokens_decode,
        expert_rows=rows,
        bytes_sent=bytes_sent,
        preemptions=preemptions,
        seconds=breakdown(totals.phase_seconds, totals.waiting_seconds),
    )
    everyone = gather_objects((own, latencies, seconds), topology.world)
    return RunReport(
        seconds=max(each for _, _, each in everyone),
        steps=totals.steps,
        ranks=[rank for rank, _, _ in everyone],
        layers=[
            LayerReport(
                layer=layer,
                rank_max_over_mean=load.max_over_mean,
                expert_max_over_mean=float(load.experts.max() / max(load.experts.mean(), 1e-9)),
                expert_loads=load.experts.tolist(),
            )
            for layer, load in sorted(loads.layers.items())
        ],
        max_over_mean=loads.max_over_mean(),
        latencies={
            key: [value for _, each, _ in everyone for value in each[key]] for key in latencies
        },
    )
