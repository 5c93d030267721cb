"""Run report: from every rank's measurements to one report; the last collective of a run.

Each group of ranks in lockstep is analysed by itself. Step lengths are measured by each rank's own
clock and differ a little, so a group's are those of its first rank: then every rank computes the
same report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.distributed.collectives import gather_objects
from engine.distributed.groups import Topology
from engine.generation.latency import Sampled, pooled
from engine.generation.totals import Totals
from engine.moe.capacity.speed_weights import ONE
from engine.profiling.collector import Collector, PhaseTotals, WaitAttribution
from engine.profiling.cost_model import ExpertCost
from engine.profiling.deepspeed_comms import CommsTable
from engine.profiling.findings import Finding, HotExpert, findings, join_replicas
from engine.profiling.loads import LayerDrops, LoadCounter
from engine.profiling.phase_clock import Phase
from engine.profiling.report import (
    LayerReport,
    LayerTotals,
    PhaseReport,
    PlanReport,
    RankReport,
    RoutingReport,
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
from engine.reporting.copies_report import (
    OwnPlacement,
    copied,
    layer_placement,
    rank_placement,
    run_placement,
)
from engine.reporting.plan_drift import PlanInUse, plan_drift


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What one rank counted in a run, besides its collector and its load counter."""

    seconds: float  # wall time of the generation loop
    totals: Totals  # steps, and tokens of this rank's own requests
    latencies: dict[str, Sampled]  # keys ttft and tpot: samples of seconds
    traffic: dict[int, tuple[int, int]]  # layer -> bytes sent to other ranks, collectives called
    preemptions: int
    drops: dict[int, LayerDrops]  # layer -> what capacity did to this rank's own tokens
    policy: str = "none"  # moe.capacity.policy
    clock_error: float = 0.0  # uncertainty of this rank's clock against the others', seconds
    weights_W: tuple[int, ...] | None = None  # each rank's share of the capacity at the end
    comms: CommsTable = field(default_factory=dict)  # DeepSpeed's table of this rank
    resolved_settings: dict[str, Any] = field(default_factory=dict)  # as in `RankReport`
    process_stalls: tuple[int, float] = (0, 0.0)  # number of them, seconds of all
    routing: RoutingReport | None = None  # of the steps that this rank has recorded
    placement: OwnPlacement | None = None  # None: without moe.placement
    state_bytes: int | None = None  # as in `RankReport`


@dataclass(frozen=True, slots=True)
class _Share:
    """What one rank sends to all others."""

    measured: Measurements
    profile: RankProfile
    replica: int
    # Of the first rank of each group: the wait that each of its ranks caused, and the imbalance of
    # its layers, float64 [L], both as in `straggler_causes.analyse`. None of other ranks.
    group: tuple[WaitAttribution, np.ndarray] | None


def run_report(
    measured: Measurements,
    collector: Collector,
    loads: LoadCounter,
    topology: Topology,
    plan: PlanInUse | None = None,
) -> RunReport:
    """Gather every rank's measurements into one report.

    plan: the placement in use, where it promises something; the same on every rank.

    Collective over all ranks: every rank must call.
    """
    own = _share(measured, collector, loads, topology)
    everyone: list[_Share] = gather_objects(own, topology.host_world)
    groups: dict[int, list[_Share]] = {}
    for share in everyone:
        groups.setdefault(share.replica, []).append(share)
    analyses = {replica: _analyse(shares) for replica, shares in groups.items()}
    group = groups[topology.replica]
    attributed = {each.rank: each for analysis in analyses.values() for each in analysis.ranks}
    layers = _layers(loads, group, analyses[topology.replica])
    weights_W, all_measured = measured.weights_W, [share.measured for share in everyone]
    return RunReport(
        seconds=max(each.seconds for each in all_measured),
        steps=measured.totals.steps,
        ranks=[_rank(share, attributed[share.profile.rank]) for share in everyone],
        layers=layers,
        max_over_mean=loads.max_over_mean(),
        max_over_mean_after=loads.max_over_mean_after(),
        speed_bound=loads.speed_bound(),
        totals=_totals(layers, group, measured.totals.steps),
        latencies={
            key: pooled([each.latencies[key] for each in all_measured])
            for key in measured.latencies
        },
        findings=_findings(groups, analyses, measured),
        wait_caused={
            cause: sum(each.wait_caused[cause] * len(each.ranks) for each in analyses.values())
            / len(everyone)
            for cause in CAUSES
        },
        clock_error=max(each.clock_error for each in all_measured),
        capacity_shares=None if weights_W is None else [share / ONE for share in weights_W],
        routing=group[0].measured.routing,
        placement=run_placement(measured.placement, [each.placement for each in layers], loads),
        plan=None if plan is None else _plan(plan, loads, group),
    )


def _share(
    measured: Measurements, collector: Collector, loads: LoadCounter, topology: Topology
) -> _Share:
    """Reduce one rank's measurements to what all ranks need of them."""
    totals = collector.totals()
    imbalance_L = np.ones(len(totals.seconds))
    for layer, load in loads.layers.items():
        imbalance_L[layer + 1] = load.max_over_mean_after
    profile = RankProfile(
        rank=topology.world.rank,
        host=topology.host,
        totals=totals,
        experts=collector.experts.table,
        attention=collector.attention.table,
        loads_after={
            layer: (load.own_experts, load.own_after.tolist())
            for layer, load in loads.layers.items()
        },
        process_stalls=measured.process_stalls,
    )
    group = (collector.wait_attribution(), imbalance_L) if topology.expert.rank == 0 else None
    return _Share(measured, profile, topology.replica, group)


def _rank(share: _Share, attributed: RankAttribution) -> RankReport:
    measured, profile = share.measured, share.profile
    return RankReport(
        rank=profile.rank,
        host=profile.host,
        tokens_prefill=measured.totals.tokens_prefill,
        tokens_decode=measured.totals.tokens_decode,
        expert_rows=sum(sum(rows) for _, rows in profile.loads_after.values()),
        bytes_sent=sum(num_bytes for num_bytes, _ in measured.traffic.values()),
        num_collectives=sum(called for _, called in measured.traffic.values()),
        preemptions=measured.preemptions,
        seconds=breakdown(profile.totals.by_phase(), float(profile.totals.waiting.sum())),
        phases=_phases(profile.totals),
        relative_compute_time=attributed.relative_compute_time,
        straggler_share=attributed.straggler_share,
        wait_caused=attributed.wait_caused,
        comms=measured.comms,
        resolved_settings=measured.resolved_settings,
        process_stall_seconds=measured.process_stalls[1],
        placement=rank_placement(measured.placement, profile.loads_after),
        expert_cost=ExpertCost.of(profile.experts),
        state_bytes=measured.state_bytes,
        surplus_rows=measured.totals.surplus_rows or None,
    )


def _plan(plan: PlanInUse, loads: LoadCounter, group: Sequence[_Share]) -> PlanReport | None:
    """Compare one group's run with the plan."""
    measured, totals = group[0].measured, [share.measured.totals for share in group]
    return plan_drift(
        plan,
        loads,
        steps=measured.totals.steps,
        tokens={
            "prefill": sum(each.tokens_prefill for each in totals),
            "decode": sum(each.tokens_decode for each in totals),
        },
        folder=None if measured.routing is None else measured.routing.folder,
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
    groups: dict[int, list[_Share]], analyses: dict[int, Analysis], measured: Measurements
) -> list[Finding]:
    has_copies = measured.placement is not None and measured.placement.copies > 0
    found = {
        replica: findings(analysis, _hottest(groups[replica]), measured.policy, has_copies)
        for replica, analysis in analyses.items()
    }
    ranks = {replica: [each.profile.rank for each in shares] for replica, shares in groups.items()}
    return join_replicas(found, ranks)


def _hottest(group: Sequence[_Share]) -> dict[int, HotExpert]:
    """Return each rank's expert with the most rows over its layer's mean, after capacity.

    The mean is over the experts; the rows are those that its home or its copy computed.
    """
    found: dict[int, HotExpert] = {}
    for layer in group[0].profile.loads_after:
        shares = [share.profile.loads_after[layer] for share in group]
        held = [
            len(copied(each.measured.placement, each.profile.loads_after, layer)) for each in group
        ]
        num_homes = sum(len(rows) for _, rows in shares) - sum(held)
        mean = sum(sum(rows) for _, rows in shares) / max(1, num_homes)
        for share, (experts, rows), copies in zip(group, shares, held, strict=True):
            rank = share.profile.rank
            for index, (expert, count) in enumerate(zip(experts, rows, strict=True)):
                over = count / mean if mean else 0.0
                if over > (found[rank].over_mean if rank in found else 0.0):
                    found[rank] = HotExpert(layer, expert, over, index >= len(rows) - copies)
    return found


def _layers(loads: LoadCounter, group: Sequence[_Share], analysis: Analysis) -> list[LayerReport]:
    """Return the report of every MoE layer of one group; `loads` are those of any of its ranks."""
    seconds_LP = np.mean([share.profile.totals.seconds for share in group], axis=0)
    placed = [(share.measured.placement, share.profile.loads_after) for share in group]
    reports = []
    for layer, load in sorted(loads.layers.items()):
        after = np.zeros_like(load.experts)
        drops = LayerDrops()
        for share in group:
            experts, rows = share.profile.loads_after[layer]
            after[experts] += rows
            drops.add(share.measured.drops.get(layer, LayerDrops()))
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
                bytes_sent=sum(share.measured.traffic[layer][0] for share in group),
                num_collectives=group[0].measured.traffic[layer][1],
                seconds={
                    phase.name.lower(): float(seconds_LP[layer + 1, phase])
                    for phase in Phase
                    if seconds_LP[layer + 1, phase]
                },
                wait=analysis.layers[layer],
                wait_by_cause=analysis.layer_causes[layer],
                shared_rows_moved=loads.shared_moved.get(layer),
                zero_assignments=drops.zero or None,
                placement=layer_placement(placed, layer, load),
            )
        )
    return reports


def _totals(layers: list[LayerReport], group: Sequence[_Share], steps: int) -> LayerTotals:
    """Sum the layers of one group."""
    drops = LayerDrops()
    for share in group:
        for of_layer in share.measured.drops.values():
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
