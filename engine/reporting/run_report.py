"""Run report: from every rank's measurements to one report; the last collective of a run.

Each group of ranks in lockstep is analysed by itself. Step lengths are measured by each rank's own
clock and differ a little, so a group's are those of its first rank: then every rank computes the
same report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engine.distributed.collectives import gather_objects
from engine.distributed.groups import Topology
from engine.generation.latency import Sampled, pooled
from engine.generation.loop import Totals
from engine.moe.capacity.speed_weights import ONE
from engine.profiling.collector import Collector, PhaseTotals, WaitAttribution
from engine.profiling.deepspeed_comms import CommsTable
from engine.profiling.findings import Finding, HotExpert, findings, join_replicas
from engine.profiling.loads import LayerDrops, LoadCounter
from engine.profiling.phase_clock import Phase
from engine.profiling.report import (
    LayerReport,
    LayerTotals,
    PhaseReport,
    RankReport,
    RunReport,
)
from engine.profiling.straggler_causes import (
    CAUSES,
    Analysis,
    RankAttribution,
    RankProfile,
    analyse,
)
from engine.profiling.wait_time import breakdown


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What one rank measured in a run."""

    seconds: float  # wall time of the generation loop
    totals: Totals  # steps, and tokens of this rank's own requests
    collector: Collector  # time per layer and phase, and for which ranks the group waited
    latencies: dict[str, Sampled]  # keys ttft and tpot: samples of seconds
    loads: LoadCounter
    traffic: dict[int, tuple[int, int]]  # layer -> bytes sent to other ranks, collectives called
    preemptions: int
    drops: dict[int, LayerDrops]  # layer -> what capacity did to this rank's own tokens
    policy: str = "none"  # moe.capacity.policy
    clock_error: float = 0.0  # uncertainty of this rank's clock against the others', seconds
    shares_W: tuple[int, ...] | None = None  # each rank's share of the capacity at the end
    comms: CommsTable = field(default_factory=dict)  # DeepSpeed's table of this rank
    resolved_settings: dict[str, Any] = field(default_factory=dict)  # as in `RankReport`
    process_stalls: tuple[int, float] = (0, 0.0)  # number of them, seconds of all


@dataclass(slots=True)
class _Share:
    """What one rank sends to all others."""

    rank: RankReport
    profile: RankProfile
    replica: int
    latencies: dict[str, Sampled]
    seconds: float
    clock_error: float  # seconds
    drops: dict[int, LayerDrops]
    traffic: dict[int, tuple[int, int]]  # layer -> bytes sent, collectives called
    # Of the first rank of each group: the wait that each of its ranks caused, and the imbalance of
    # its layers, float64 [L], both as in `straggler_causes.analyse`. None of other ranks.
    group: tuple[WaitAttribution, np.ndarray] | None


def run_report(measured: Measurements, topology: Topology) -> RunReport:
    """Gather every rank's measurements into one report.

    Collective over all ranks: every rank must call.
    """
    everyone: list[_Share] = gather_objects(_share(measured, topology), topology.world)
    groups: dict[int, list[_Share]] = {}
    for share in everyone:
        groups.setdefault(share.replica, []).append(share)
    analyses = {replica: _analyse(shares) for replica, shares in groups.items()}
    group = groups[topology.replica]
    attributed = {each.rank: each for analysis in analyses.values() for each in analysis.ranks}
    loads, steps, shares_W = measured.loads, measured.totals.steps, measured.shares_W
    layers = _layers(loads, group, analyses[topology.replica])
    return RunReport(
        seconds=max(share.seconds for share in everyone),
        steps=steps,
        ranks=[_add_attribution(share.rank, attributed[share.rank.rank]) for share in everyone],
        layers=layers,
        max_over_mean=loads.max_over_mean(),
        max_over_mean_after=loads.max_over_mean_after(),
        speed_bound=loads.speed_bound(),
        totals=_totals(layers, group, steps),
        latencies={
            key: pooled([share.latencies[key] for share in everyone]) for key in measured.latencies
        },
        findings=_findings(groups, analyses, measured.policy),
        wait_caused={
            cause: sum(each.wait_caused[cause] * len(each.ranks) for each in analyses.values())
            / len(everyone)
            for cause in CAUSES
        },
        clock_error=max(share.clock_error for share in everyone),
        capacity_shares=None if shares_W is None else [share / ONE for share in shares_W],
    )


def _share(measured: Measurements, topology: Topology) -> _Share:
    """Reduce one rank's measurements to what all ranks need of them."""
    collector, layers, traffic = measured.collector, measured.loads.layers, measured.traffic
    phases = collector.totals()
    imbalance_L = np.ones(len(phases.seconds))
    for layer, load in layers.items():
        imbalance_L[layer + 1] = load.max_over_mean_after
    rank, host = topology.world.rank, topology.host
    return _Share(
        rank=RankReport(
            rank=rank,
            host=host,
            tokens_prefill=measured.totals.tokens_prefill,
            tokens_decode=measured.totals.tokens_decode,
            expert_rows=sum(int(load.own_after.sum()) for load in layers.values()),
            bytes_sent=sum(num_bytes for num_bytes, _ in traffic.values()),
            num_collectives=sum(called for _, called in traffic.values()),
            preemptions=measured.preemptions,
            seconds=breakdown(phases.by_phase(), float(phases.waiting.sum())),
            phases=_phases(phases),
            comms=measured.comms,
            resolved_settings=measured.resolved_settings,
            process_stall_seconds=measured.process_stalls[1],
        ),
        profile=RankProfile(
            rank=rank,
            host=host,
            totals=phases,
            experts=collector.experts.table,
            attention=collector.attention.table,
            loads_after={
                layer: (load.first_expert, load.own_after.tolist())
                for layer, load in layers.items()
            },
            process_stalls=measured.process_stalls,
        ),
        replica=topology.replica,
        latencies=measured.latencies,
        seconds=measured.seconds,
        clock_error=measured.clock_error,
        drops=measured.drops,
        traffic=traffic,
        group=(collector.wait_attribution(), imbalance_L) if topology.expert.rank == 0 else None,
    )


def _phases(totals: PhaseTotals) -> dict[str, PhaseReport]:
    return {
        phase.name.lower(): PhaseReport(
            seconds=float(totals.seconds[:, phase].sum()),
            waiting=float(totals.waiting[:, phase].sum()),
            tokens=int(totals.tokens[:, phase].sum()),
            bytes_sent=int(totals.num_bytes[:, phase].sum()),
        )
        for phase in Phase
        if totals.calls[:, phase].any()
    }


def _analyse(group: Sequence[_Share]) -> Analysis:
    """Analyse one group, from its first rank's attribution."""
    assert group[0].group is not None
    return analyse([share.profile for share in group], *group[0].group)


def _findings(
    groups: dict[int, list[_Share]], analyses: dict[int, Analysis], policy: str
) -> list[Finding]:
    found = {
        replica: findings(analysis, _hottest(groups[replica]), policy)
        for replica, analysis in analyses.items()
    }
    ranks = {replica: [share.rank.rank for share in shares] for replica, shares in groups.items()}
    return join_replicas(found, ranks)


def _add_attribution(report: RankReport, attributed: RankAttribution) -> RankReport:
    return replace(
        report,
        relative_compute_time=attributed.relative_compute_time,
        straggler_share=attributed.straggler_share,
        wait_caused=dict(attributed.wait_caused),
    )


def _hottest(group: Sequence[_Share]) -> dict[int, HotExpert]:
    """Return each rank's expert with the most rows over its layer's mean, after capacity."""
    found: dict[int, HotExpert] = {}
    for layer in group[0].profile.loads_after:
        shares = [share.profile.loads_after[layer] for share in group]
        mean = sum(sum(rows) for _, rows in shares) / max(1, sum(len(rows) for _, rows in shares))
        for share, (first, rows) in zip(group, shares, strict=True):
            rank = share.rank.rank
            for expert, count in enumerate(rows, first):
                over = count / mean if mean else 0.0
                if over > (found[rank].over_mean if rank in found else 0.0):
                    found[rank] = HotExpert(layer, expert, over)
    return found


def _layers(loads: LoadCounter, group: Sequence[_Share], analysis: Analysis) -> list[LayerReport]:
    """Return the report of every MoE layer of one group; `loads` are those of any of its ranks."""
    seconds_LP = np.mean([share.profile.totals.seconds for share in group], axis=0)
    reports = []
    for layer, load in sorted(loads.layers.items()):
        after = np.zeros_like(load.experts)
        drops = LayerDrops()
        for share in group:
            first, rows = share.profile.loads_after[layer]
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
                seconds={
                    phase.name.lower(): float(seconds_LP[layer + 1, phase])
                    for phase in Phase
                    if seconds_LP[layer + 1, phase]
                },
                wait=analysis.layers[layer],
                wait_by_cause=analysis.layer_causes[layer],
            )
        )
    return reports


def _totals(layers: list[LayerReport], group: Sequence[_Share], steps: int) -> LayerTotals:
    """Sum the layers of one group."""
    drops = LayerDrops()
    for share in group:
        for of_layer in share.drops.values():
            drops.add(of_layer)
    calls = steps * len(layers)  # every layer runs once per step, on ranks without tokens too
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
    """Return part / whole, or `nothing` where the whole is 0."""
    return part / whole if whole else nothing


def _max_over_mean(loads_E: np.ndarray) -> float:
    return float(loads_E.max() / loads_E.mean()) if loads_E.any() else 1.0
