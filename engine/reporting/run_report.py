"""From every rank's totals to the run's report; the last collective of a run.

Ranks that step together are analysed together, every group of them. Stamps are each rank's own, so
two ranks would not measure one step alike: what a group did is told by its first rank alone, and
all ranks come to the same report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.distributed.collectives import gather_objects
from engine.distributed.groups import Topology
from engine.generation.latency import Sample, Taken, pooled
from engine.generation.loop import Totals
from engine.moe.capacity.speed_weights import ONE
from engine.profiling.collector import Charges, Collector, PhaseTotals
from engine.profiling.deepspeed_comms import CommsTable
from engine.profiling.findings import Finding, HotExpert, of_replicas, verdicts
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


@dataclass(slots=True)
class _Share:
    """What one rank hands in. traffic: layer -> bytes sent, collectives called. clock_error: of its
    clock against the others', seconds. group: from the first rank of each, for whom it waited and
    the imbalance of its layers, as `straggler.analyse` takes them.
    """

    rank: RankReport
    profile: RankProfile
    replica: int
    latencies: dict[str, Taken]
    seconds: float
    clock_error: float
    drops: dict[int, LayerDrops]
    traffic: dict[int, tuple[int, int]]
    group: tuple[Charges, np.ndarray] | None


def run_report(
    seconds: float,
    totals: Totals,
    profile: Collector,
    latencies: dict[str, Sample],
    loads: LoadCounter,
    topology: Topology,
    *,
    traffic: dict[int, tuple[int, int]],
    preemptions: int,
    drops: dict[int, LayerDrops],
    policy: str = "none",
    clock_error: float = 0.0,
    shares_W: tuple[int, ...] | None = None,
    comms: CommsTable | None = None,
    resolved: dict[str, Any] | None = None,
    absent: tuple[int, float] = (0, 0.0),
) -> RunReport:
    """Gather every rank's totals into one report, the same on every rank of a replica; layers are
    of this rank's own group, and all else is the same on every rank.

    traffic: layer -> bytes this rank sent to others, collectives it called. drops: layer -> what
    capacity did to this rank's own tokens. policy: moe.capacity.policy. clock_error: seconds.
    absent: how often this rank's process did not run, and seconds of it. shares_W: of the
    capacity, at the end. comms: DeepSpeed's table of this rank. resolved: as in
    `RankReport`. Collective over
    all ranks: every rank must call.
    """
    phases = profile.totals()
    imbalance_L = np.ones(len(phases.seconds))
    for layer, load in loads.layers.items():
        imbalance_L[layer + 1] = load.max_over_mean_after
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
            seconds=breakdown(phases.by_phase(), float(phases.waiting.sum())),
            phases=_phases(phases),
            comms=comms or {},
            resolved=resolved or {},
            absent=absent[1],
        ),
        profile=RankProfile(
            rank=topology.world.rank,
            host=topology.host,
            totals=phases,
            experts=profile.experts.table,
            attention=profile.attention.table,
            loads_after={
                layer: (load.first_expert, load.own_after.tolist())
                for layer, load in loads.layers.items()
            },
            absent=absent,
        ),
        replica=topology.replica,
        latencies={key: sample.taken() for key, sample in latencies.items()},
        seconds=seconds,
        clock_error=clock_error,
        drops=drops,
        traffic=traffic,
        group=(profile.charges(), imbalance_L) if topology.expert.rank == 0 else None,
    )
    everyone: list[_Share] = gather_objects(own, topology.world)
    groups: dict[int, list[_Share]] = {}
    for share in everyone:
        groups.setdefault(share.replica, []).append(share)
    analyses = {replica: _analyse(shares) for replica, shares in groups.items()}
    group = groups[topology.replica]
    blamed = {blame.rank: blame for analysis in analyses.values() for blame in analysis.ranks}
    layers = _layers(loads, group, analyses[topology.replica])
    return RunReport(
        seconds=max(share.seconds for share in everyone),
        steps=totals.steps,
        ranks=[_blame(share.rank, blamed[share.rank.rank]) for share in everyone],
        layers=layers,
        max_over_mean=loads.max_over_mean(),
        max_over_mean_after=loads.max_over_mean_after(),
        speed_bound=loads.speed_bound(),
        totals=_totals(layers, group, totals.steps),
        latencies={key: pooled([share.latencies[key] for share in everyone]) for key in latencies},
        verdict=_verdict(groups, analyses, policy),
        lost={
            cause: sum(each.lost[cause] * len(each.ranks) for each in analyses.values())
            / len(everyone)
            for cause in CAUSES
        },
        clock_error=max(share.clock_error for share in everyone),
        capacity_shares=None if shares_W is None else [share / ONE for share in shares_W],
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
    """One group's analysis, from what its first rank says of it."""
    assert group[0].group is not None
    charges, imbalance_L = group[0].group
    return analyse([share.profile for share in group], charges, imbalance_L)


def _verdict(
    groups: dict[int, list[_Share]], analyses: dict[int, Analysis], policy: str
) -> list[Finding]:
    found = {
        replica: verdicts(analysis, _hottest(groups[replica]), policy)
        for replica, analysis in analyses.items()
    }
    return of_replicas(
        found,
        {
            replica: [blame.rank for blame in analysis.ranks]
            for replica, analysis in analyses.items()
        },
    )


def _blame(report: RankReport, blame: RankAttribution) -> RankReport:
    """Add what the analysis says."""
    return replace(
        report, slowness=blame.slowness, late_share=blame.late_share, lost=dict(blame.lost)
    )


def _hottest(group: Sequence[_Share]) -> dict[int, HotExpert]:
    """The expert of every rank that stands out most in its layer, after capacity."""
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
                lost=analysis.layers[layer],
                lost_by_cause=analysis.layer_causes[layer],
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
