"""From two ranks' counters to one report, on hand-worked numbers.

4 experts on 2 ranks, 2 MoE layers (numbers 1 and 3), 2 steps. Rows of each expert, and what the
ranks' experts worked on:

    layer  step  before       ranks   after                       ranks
    1      1     6 2 | 3 1    8  4    4 2 | 3 1 (two dropped)      6  4
    1      2     2 0 | 1 1    2  2    2 0 | 1 1                    2  2
    3      1     1 1 | 5 5    2 10    1 2 | 4 4 (two, one extra)   3  8
    3      2     1 1 | 1 1    2  2    1 1 | 1 1                    2  2

Run: pytest tests/unit/reporting/test_run_report.py
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import engine.reporting.run_report
from engine.generation.latency import Sample
from engine.generation.totals import Totals
from engine.moe.placement.placement import LayerPlacement, Placement, PlannedLoads
from engine.profiling.collector import Collector
from engine.profiling.findings import HotExpert
from engine.profiling.loads import LayerDrops, LoadCounter
from engine.profiling.phase_clock import Phase
from engine.profiling.report import (
    LayerPlacementReport,
    LayerTotals,
    RankPlacement,
    RunPlacement,
    RunReport,
)
from engine.reporting.copies_report import OwnPlacement
from engine.reporting.plan_drift import PlanInUse
from engine.reporting.run_report import Measurements, run_report
from tests.helpers.profiles import Simulation, make_spans

BEFORE = {1: [[6, 2, 3, 1], [2, 0, 1, 1]], 3: [[1, 1, 5, 5], [1, 1, 1, 1]]}
AFTER = {1: [[4, 2, 3, 1], [2, 0, 1, 1]], 3: [[1, 2, 4, 4], [1, 1, 1, 1]]}
STEPS = 2


def loads_of(expert_rank: int) -> LoadCounter:
    """The counter of one of the two ranks after both steps."""
    loads = LoadCounter()
    own = slice(2 * expert_rank, 2 * expert_rank + 2)
    for step in range(STEPS):
        for layer, before in BEFORE.items():
            before_E = np.array(before[step])
            loads.record(
                layer,
                before_E=before_E,
                rank_before=[int(before_E[:2].sum()), int(before_E[2:].sum())],
                own_after=AFTER[layer][step][own],
                own_experts=[own.start, own.start + 1],
            )
        assert loads.take_rows() == [sum(after[step][own]) for after in AFTER.values()]
        rows_LW = [[sum(after[step][:2]), sum(after[step][2:])] for after in AFTER.values()]
        loads.set_exchanged(np.array(rows_LW).T)
    return loads


@dataclass
class Rank:
    """What one rank measured."""

    rank: int
    replica: int = 0
    seconds: float = 1.0
    steps: int = STEPS
    latencies: dict[str, list[float]] = field(default_factory=lambda: {"ttft": [], "tpot": []})
    loads: LoadCounter = field(default_factory=LoadCounter)
    traffic: dict[int, tuple[int, int]] = field(default_factory=dict)
    drops: dict[int, LayerDrops] = field(default_factory=dict)
    collector: Collector = field(default_factory=lambda: Collector(4, 2))
    placement: OwnPlacement | None = None
    plan: PlanInUse | None = None

    def report(self) -> RunReport:
        topology: Any = SimpleNamespace(
            world=SimpleNamespace(rank=self.rank),
            host_world=SimpleNamespace(rank=self.rank),
            expert=SimpleNamespace(rank=self.rank % 2),
            replica=self.replica,
            host=f"host{self.rank}",
        )
        measured = Measurements(
            seconds=self.seconds,
            totals=Totals(steps=self.steps, tokens_prefill=10 + self.rank),
            latencies={key: sample_of(values).sampled() for key, values in self.latencies.items()},
            traffic=self.traffic,
            preemptions=self.rank,
            drops=self.drops,
            placement=self.placement,
        )
        return run_report(measured, self.collector, self.loads, topology, self.plan)


def sample_of(values: list[float]) -> Sample:
    sample = Sample()
    for value in values:
        sample.add(value)
    return sample


class Gathering(Exception):
    """In place of waiting for the other ranks."""


def reports(monkeypatch: pytest.MonkeyPatch, ranks: list[Rank]) -> list[RunReport]:
    """Every rank's report: the first round collects what each sends, the second returns it."""
    shares: list[Any] = []

    def collect(share: Any, group: Any) -> list[Any]:
        shares.append(share)
        raise Gathering

    monkeypatch.setattr(engine.reporting.run_report, "gather_objects", collect)
    for rank in ranks:
        with pytest.raises(Gathering):
            rank.report()
    monkeypatch.setattr(engine.reporting.run_report, "gather_objects", lambda share, group: shares)
    return [rank.report() for rank in ranks]


def two_ranks(first: int = 0, replica: int = 0) -> list[Rank]:
    return [
        Rank(
            first,
            replica,
            seconds=2.0,
            latencies={"ttft": [0.1], "tpot": [0.01, 0.02]},
            loads=loads_of(0),
            traffic={1: (100, 6), 3: (10, 8)},
            drops={
                1: LayerDrops(routed=9, dropped=2, added=0, orphans=1, mass=4.5, mass_kept=3.5),
                3: LayerDrops(routed=9, dropped=0, added=0, orphans=0, mass=4.5, mass_kept=4.5),
            },
        ),
        Rank(
            first + 1,
            replica,
            seconds=3.0,
            latencies={"ttft": [0.3], "tpot": []},
            loads=loads_of(1),
            traffic={1: (50, 6), 3: (20, 8)},
            drops={
                1: LayerDrops(routed=7, dropped=0, added=0, orphans=0, mass=3.5, mass_kept=3.5),
                3: LayerDrops(routed=7, dropped=2, added=1, orphans=2, mass=3.5, mass_kept=2.0),
            },
        ),
    ]


def test_a_layer_has_all_ranks_loads_before_and_after(monkeypatch):
    report, other = reports(monkeypatch, two_ranks())
    assert report == other, "the same on every rank"
    one, three = report.layers
    assert (one.layer, three.layer) == (1, 3)
    assert (one.expert_loads, one.expert_loads_after) == ([8, 2, 4, 2], [6, 2, 4, 2])
    assert (three.expert_loads, three.expert_loads_after) == ([2, 2, 6, 6], [2, 3, 5, 5])
    assert one.expert_max_over_mean == 8 / 4
    assert one.expert_max_over_mean_after == pytest.approx(6 / 3.5)
    # The most loaded rank of each step, over the mean rank of each step.
    assert one.rank_max_over_mean == (8 + 2) / (6 + 2)
    assert one.rank_max_over_mean_after == pytest.approx((6 + 2) / (5 + 2))
    assert three.rank_max_over_mean == (10 + 2) / (6 + 2)
    assert three.rank_max_over_mean_after == pytest.approx((8 + 2) / (5.5 + 2))


def test_what_ranks_dropped_of_their_own_tokens_is_added_up(monkeypatch):
    report, _ = reports(monkeypatch, two_ranks())
    one, three = report.layers
    assert (one.assignments, one.dropped, one.added, one.orphans) == (16, 2, 0, 1)
    assert (three.assignments, three.dropped, three.added, three.orphans) == (16, 2, 1, 2)
    assert (one.drop_rate, one.gate_mass_kept) == (2 / 16, 7 / 8)
    assert (three.drop_rate, three.gate_mass_kept) == (2 / 16, 6.5 / 8)
    for layer in report.layers:  # here every token is subject to capacity
        after = sum(layer.expert_loads) - layer.dropped + layer.added
        assert sum(layer.expert_loads_after) == after


def test_without_a_placement_the_report_says_nothing_of_one(monkeypatch):
    report, _ = reports(monkeypatch, two_ranks())
    assert report.placement is None and not report.has_copies
    assert [each.placement for each in (*report.ranks, *report.layers)] == [None] * 4


def placed_ranks() -> list[Rank]:
    """Two steps of layer 1, 4 experts: homes 0 1 0 1, a copy of expert 0 on rank 1.

    step  before     homes  after                        ranks
    1     10 2 2 2   12 4   rank 0: 6 2, rank 1: 2 2, 4   8 8
    2     3 1 1 1    4  2   rank 0: 2 1, rank 1: 1 1, 1   3 3
    """
    ranks = []
    for rank, own in enumerate(([0, 2], [1, 3, 0])):
        loads = LoadCounter()
        for before, homes, after in (
            ([10, 2, 2, 2], [12, 4], ([6, 2], [2, 2, 4])),
            ([3, 1, 1, 1], [4, 2], ([2, 1], [1, 1, 1])),
        ):
            loads.record(
                1,
                before_E=np.array(before),
                rank_before=homes,
                own_after=after[rank],
                own_experts=own,
            )
            loads.take_rows()
            loads.set_exchanged(np.array([[sum(rows)] for rows in after]))
        placement = OwnPlacement(
            file="p.yaml",
            digest="1f0c",
            precision="int4",
            copies=1,
            num_homes={1: 2},
            copy_bytes=(0, 640)[rank],
        )
        ranks.append(Rank(rank, loads=loads, traffic={1: (0, 6)}, placement=placement))
    return ranks


def test_what_copies_computed_is_told_by_rank_by_expert_and_as_a_share_of_balance(monkeypatch):
    report, other = reports(monkeypatch, placed_ranks())
    assert report == other, "the same on every rank"
    (layer,) = report.layers
    assert layer.expert_loads == layer.expert_loads_after == [13, 3, 3, 3]
    # Mean rank 8 + 3 rows; most loaded 12 + 4 by homes, 8 + 3 as run.
    assert layer.rank_max_over_mean == 16 / 11
    assert layer.placement == LayerPlacementReport(5, [5, 0, 0, 0], 11 / 16, 1.0)
    assert report.placement == RunPlacement("p.yaml", "1f0c", "int4", 1, 5, 11 / 16, 1.0)
    assert [each.placement for each in report.ranks] == [RankPlacement(0, 0), RankPlacement(5, 640)]
    assert [each.expert_rows for each in report.ranks] == [11, 11]


def test_the_share_counts_what_was_dropped_as_balance_that_was_reached(monkeypatch):
    ranks = placed_ranks()
    for rank in ranks:
        rank.loads.layers[1].slowest_after -= 1.0  # a row of the most loaded rank is dropped
    report, _ = reports(monkeypatch, ranks)
    assert report.placement is not None and report.placement.share_after == 11 / 10


def test_the_hottest_expert_of_a_rank_may_be_its_copy(monkeypatch):
    ranks = placed_ranks()
    found: list[Any] = []
    name = "findings"
    monkeypatch.setattr(engine.reporting.run_report, name, lambda *args: found.append(args) or [])
    reports(monkeypatch, ranks)
    _, hottest, _, has_copies = found[0]
    # The layer's mean expert has 22 / 4 rows.
    assert hottest == {0: HotExpert(1, 0, 8 / 5.5), 1: HotExpert(1, 0, 5 / 5.5, is_copy=True)}
    assert has_copies


def test_the_run_has_totals_over_its_layers(monkeypatch):
    report, _ = reports(monkeypatch, two_ranks())
    assert report.totals == LayerTotals(
        assignments=32,
        dropped=4,
        added=1,
        orphans=3,
        gate_mass_kept=13.5 / 16,  # by mass, not the mean of the layers' shares
        drop_rate=4 / 32,
        bytes_sent=180,
        collectives_per_call=(6 + 8) / (2 * STEPS),
    )
    assert report.max_over_mean == (10 + 12) / (8 + 8)
    assert report.max_over_mean_after == pytest.approx((8 + 10) / (7 + 7.5))
    assert report.speed_bound == pytest.approx((10 + 12) / (8 + 10))


def test_traffic_is_reported_by_layer_and_by_rank(monkeypatch):
    report, _ = reports(monkeypatch, two_ranks())
    assert [(layer.bytes_sent, layer.num_collectives) for layer in report.layers] == [
        (150, 6),
        (30, 8),
    ]
    assert [(rank.bytes_sent, rank.num_collectives) for rank in report.ranks] == [
        (110, 14),
        (70, 14),
    ]
    # Rows after capacity, extras included: 6 + 2 + 2 + 3 and 4 + 2 + 5 + 5.
    assert [rank.expert_rows for rank in report.ranks] == [13, 16]
    assert [rank.tokens_prefill for rank in report.ranks] == [10, 11]
    assert [rank.preemptions for rank in report.ranks] == [0, 1]


def test_a_replica_reports_its_own_layers_and_all_ranks(monkeypatch):
    quiet = two_ranks(first=2, replica=1)
    for rank in quiet:
        rank.drops, rank.seconds = {}, 9.0
        rank.traffic = dict.fromkeys(BEFORE, (7, 6))
    everyone = reports(monkeypatch, two_ranks() + quiet)
    assert everyone[0] == everyone[1] and everyone[2] == everyone[3]
    first, second = everyone[0], everyone[2]
    assert first.totals.dropped == 4 and first.totals.bytes_sent == 180
    assert second.totals.dropped == 0 and second.totals.bytes_sent == 4 * 7
    assert first.layers[0].expert_loads == [8, 2, 4, 2], "not the rows of both replicas"
    for report in (first, second):
        assert [rank.rank for rank in report.ranks] == [0, 1, 2, 3]
        assert report.seconds == 9.0, "the slowest rank's"
        found = {key: values.tolist() for key, values in report.latencies.items()}
        assert found == {"ttft": [0.1, 0.3] * 2, "tpot": [0.01, 0.02] * 2}


def timed_ranks(slow: int | None, first: int = 0, replica: int = 0) -> list[Rank]:
    """Two ranks that stepped for about a second, one of them slow; their clocks do not quite agree
    on how long a step was.
    """
    simulation = Simulation(2)
    for turn in range(200):
        work = [2.0 if rank == slow else 1.0 for rank in range(2)]
        simulation.step(
            host=[0.2 + 0.1 * (turn % 2), 0.3 - 0.1 * (turn % 2)],
            attention=work,
            experts=[2 * each for each in work],
            tokens=[8, 8],
            rows=[8, 8],
            transfer=0.3,
        )
    ranks = []
    for rank, collector in enumerate(simulation.collectors):
        longer = make_spans((Phase.CONTROL, -1, 0, 1), (Phase.OTHER, -1, 1, 2 + rank))
        collector.add(longer, np.array([[0], [0]]))
        loads = LoadCounter()
        rows = np.array([8, 8])
        loads.record(0, before_E=rows, rank_before=[8, 8], own_after=[8], own_experts=[rank])
        loads.take_rows()
        loads.set_exchanged(np.array([[8], [8]]))
        ranks.append(
            Rank(first + rank, replica, loads=loads, traffic={0: (0, 0)}, collector=collector)
        )
    return ranks


def test_all_ranks_have_one_report_though_each_measured_the_steps_by_its_own_clock(monkeypatch):
    ranks = timed_ranks(slow=1)
    lengths = {rank.collector.wait_attribution().step_seconds for rank in ranks}
    assert len(lengths) == 2, "every rank would find another result"
    first, second = reports(monkeypatch, ranks)
    assert first == second
    assert first.wait_caused["device"] > 0 and first.wait_caused["network"] > 0
    assert [each.ranks for each in first.findings if each.cause == "device"] == [[1]]


def test_the_findings_are_of_every_replica_and_the_same_on_all_ranks(monkeypatch):
    ranks = timed_ranks(slow=None) + timed_ranks(slow=1, first=2, replica=1)
    everyone = reports(monkeypatch, ranks)
    for report in everyone:
        assert report.findings == everyone[0].findings
        assert report.ranks == everyone[0].ranks and report.wait_caused == everyone[0].wait_caused
        assert [each.ranks for each in report.findings] == [[3]]
        assert report.findings[0].text.startswith("replica 1 (ranks 2-3): rank 3 on host3 computes")
        assert [rank.relative_compute_time > 1.5 for rank in report.ranks] == [
            False,
            False,
            False,
            True,
        ]
    quiet = reports(monkeypatch, timed_ranks(None) + timed_ranks(None, first=2, replica=1))
    for report in quiet:
        (finding,) = report.findings
        assert finding.cause == "balanced" and finding.text.startswith("replica ")


def test_where_no_token_was_subject_to_capacity_nothing_was_dropped(monkeypatch):
    ranks = two_ranks()
    for rank in ranks:
        rank.drops = {layer: LayerDrops() for layer in BEFORE}
    report, _ = reports(monkeypatch, ranks)
    for part in (*report.layers, report.totals):
        assert (part.assignments, part.dropped, part.added, part.orphans) == (0, 0, 0, 0)
        assert (part.gate_mass_kept, part.drop_rate) == (1.0, 0.0)


def test_a_run_without_steps_or_without_moe_layers_has_a_report(monkeypatch):
    for steps in (0, 5):
        (report,) = reports(monkeypatch, [Rank(0, steps=steps, collector=Collector(4, 1))])
        assert report.layers == [] and report.totals == LayerTotals()
        assert (report.max_over_mean, report.max_over_mean_after) == (1.0, 1.0)
        assert report.speed_bound == 1.0


def test_what_the_placement_promised_is_compared_with_what_the_group_got(monkeypatch):
    layers = {index: LayerPlacement.contiguous(4, 2) for index in BEFORE}
    rows = {1: (8, 2, 4, 2), 3: (2, 2, 6, 6)}  # those of the run
    domain = PlannedLoads(0.9, {1: 0.8, 3: 1.0}, rows)
    placement = Placement(2, 4, layers, domains={"text": domain})
    ranks = two_ranks()
    for rank in ranks:
        rank.plan = PlanInUse(placement, "plan.yaml", phases=("prefill",))
    first, other = reports(monkeypatch, ranks)
    assert first == other and first.plan is not None
    assert (first.plan.file, first.plan.domain, first.plan.distance) == ("plan.yaml", "text", 0)
    # Rows before capacity over the most loaded rank's after it, of both layers: 16 / (8 + 10).
    assert (first.plan.share, first.plan.promised) == (pytest.approx(16 / 18), 0.9)
    assert [(each.layer, each.share) for each in first.plan.layers] == [(1, 8 / 8), (3, 8 / 10)]
    for rank in ranks:
        rank.plan = None
    assert all(report.plan is None for report in reports(monkeypatch, ranks))


def test_every_rank_reports_what_the_calls_of_its_experts_cost(monkeypatch):
    ranks = timed_ranks(slow=1)
    first, _ = reports(monkeypatch, ranks)
    fast, slow = (each.expert_cost for each in first.ranks)
    assert fast is not None and slow is not None
    assert fast.rows == slow.rows == [8.0] and fast.calls == [200]
    assert slow.seconds[0] == pytest.approx(2 * fast.seconds[0])
    (untimed,) = reports(monkeypatch, [Rank(0, collector=Collector(4, 1))])
    assert untimed.ranks[0].expert_cost is None
