"""When a job is told to plan its placement again, on hand-worked loads.

4 experts on 2 ranks, homes 0 0 1 1, one MoE layer (number 3). Planned for `text`, whose rows are
even, and for `tasks`, of which expert 0 has 70%. Without copies the share of `tasks` is 50 / 80.

Run: pytest tests/unit/reporting/test_plan_drift.py
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config import CapacityConfig, CopiesConfig, MoEConfig
from engine.moe.placement.placement import LayerPlacement, Placement, PlannedLoads
from engine.moe.placement.predict import predicted_share
from engine.profiling.loads import LoadCounter
from engine.profiling.report import PlanReport
from engine.reporting.plan_drift import PlanInUse, plan_drift, plan_in_use

LAYER = 3
TEXT, TASKS = (250, 250, 250, 250), (700, 100, 100, 100)
EVEN = LayerPlacement((0, 0, 1, 1), ((), (), (), ()))
COPIED = LayerPlacement((0, 0, 1, 1), ((1,), (), (), ()))  # expert 0 on both ranks


def placement_for(layer: LayerPlacement = EVEN, **domains: tuple[int, ...]) -> Placement:
    """A placement that promises what the layer gives for the mean loads of each domain."""
    planned = {}
    for name, rows in domains.items():
        share = predicted_share(layer, np.array([rows]), 2)
        planned[name] = PlannedLoads(share, {LAYER: share}, {LAYER: rows})
    return Placement(2, 4, {LAYER: layer}, domains=planned)


def run_of(*steps: tuple[tuple[int, ...], tuple[int, int]], **options: Any) -> LoadCounter:
    """The counter of a run: of every step the rows of each expert, and of each rank after it."""
    loads = LoadCounter(**options)
    for before, after in steps:
        before_E = np.array(before)
        ranks = [int(before_E[:2].sum()), int(before_E[2:].sum())]
        loads.record(
            LAYER, before_E=before_E, rank_before=ranks, own_after=[after[0]], own_experts=[0]
        )
        loads.take_rows()
        loads.set_exchanged(np.array([[after[0]], [after[1]]]))
    return loads


def compared(
    placement: Placement,
    loads: LoadCounter,
    steps: int = 1,
    folder: str | None = None,
    **changes: Any,
) -> PlanReport:
    plan = replace(PlanInUse(placement, "plan.yaml"), **changes)
    tokens = {"prefill": 90, "decode": 10}
    report = plan_drift(plan, loads, steps=steps, tokens=tokens, folder=folder)
    assert report is not None
    return report


def test_a_job_of_the_planned_traffic_is_not_told_to_plan_again():
    report = compared(placement_for(text=TEXT), run_of((TEXT, (500, 500))))
    assert (report.verdict, report.domain, report.distance) == ("kept", "text", 0)
    assert (report.share, report.promised) == (1, 1)
    assert report.expected is None, "nothing was priced again"
    (line,) = report.text
    assert line == (
        "Placement plan.yaml: share of perfect balance 1.00, promised 1.00 for 'text', the nearest "
        "(0% of the rows are at other experts)."
    )


def test_the_nearest_domain_and_the_distance_to_each_are_named():
    placement = placement_for(text=TEXT, tasks=TASKS)
    report = compared(placement, run_of(((680, 120, 100, 100), (800, 200))))
    assert report.domain == "tasks"
    assert report.distances == pytest.approx({"text": 0.43, "tasks": 0.02})
    assert report.verdict == "kept" and report.promised == pytest.approx(500 / 800)
    assert "promised 0.62 for 'tasks', the nearest of its 2 kinds of traffic (2%" in report.text[0]


def test_where_loads_have_drifted_the_job_is_told_to_plan_again_and_how():
    report = compared(placement_for(text=TEXT), run_of((TASKS, (800, 200))))
    assert report.verdict == "plan again"
    assert report.share == pytest.approx(500 / 800) and report.distance == pytest.approx(0.45)
    assert report.expected is not None and report.expected > 0.94
    assert report.predicted == pytest.approx(500 / 800, abs=0.03)
    (layer,) = report.layers
    assert (layer.layer, layer.promised, layer.share) == (LAYER, 1, 500 / 800)
    _, why, advice = report.text
    assert why.startswith("Plan again: its loads have drifted") and "layer 3 (0.62 of 1.00)" in why
    assert advice == (
        "Record such traffic with profiler.routing=DIR, then run: python tools/plan_placement.py "
        "DIR --from plan.yaml --out NEXT"
    )


def test_a_job_that_has_recorded_its_routing_is_told_to_plan_from_that():
    report = compared(placement_for(text=TEXT), run_of((TASKS, (800, 200))), folder="seen")
    assert report.text[-1] == (
        "This run's routing is recorded; run: python tools/plan_placement.py seen --from plan.yaml "
        "--out NEXT"
    )


def test_a_run_of_too_few_rows_is_not_judged():
    report = compared(placement_for(text=TEXT), run_of(((70, 10, 10, 10), (80, 20))))
    assert report.verdict == "too few rows" and report.text[1].startswith("Too few rows")


def test_small_steps_are_no_reason_to_plan_again():
    steps = [((4, 2, 1, 1), (6, 2)), ((1, 1, 4, 2), (2, 6)), ((2, 2, 2, 2), (4, 4))] * 100
    report = compared(placement_for(text=TEXT), run_of(*steps), steps=300)
    assert report.distance < 0.15 and report.share == pytest.approx(12 / 16)
    assert report.verdict == "small steps" and "No reason to plan again" in report.text[1]


def test_large_steps_that_differ_from_one_another_are_told_from_drift():
    steps = [((400, 400, 100, 100), (800, 200)), ((100, 100, 400, 400), (200, 800))]
    report = compared(placement_for(text=TEXT), run_of(*steps), steps=2)
    assert report.verdict == "uneven steps" and report.distance == 0
    assert "single steps differ more" in report.text[1] and "tools/plan" in report.text[2]
    assert "times per row" not in report.text[1]


def test_low_bit_copies_promise_no_more_than_the_share_up_to_which_they_take_rows():
    placement = placement_for(COPIED, tasks=TASKS)
    assert placement.domains["tasks"].share == 1
    loads = run_of((TASKS, (556, 444)))  # 500 / 0.9, rounded up
    report = compared(placement, loads, low_bit_share=0.9)
    assert (report.verdict, report.promised) == ("kept", 0.9)
    assert compared(placement, loads).verdict != "kept", "the model's precision takes all"
    # Its own steps are priced with the target, too.
    report = compared(placement, run_of((TASKS, (600, 400))), low_bit_share=0.9)
    assert report.predicted == pytest.approx(0.9, abs=0.005)


def test_the_share_under_a_capacity_policy_counts_the_rows_before_it():
    report = compared(placement_for(text=TEXT), run_of((TASKS, (525, 200))))  # 275 dropped
    assert report.share == pytest.approx(500 / 525) and report.verdict == "kept"


def test_where_copies_take_rows_of_one_phase_the_plan_is_not_compared():
    loads = run_of((TASKS, (800, 200)))
    placement = placement_for(COPIED, tasks=TASKS)
    report = compared(placement, loads, phases=("decode",))  # a tenth of the tokens
    assert report.verdict == "other phases" and "rows of decode tokens only" in report.text[1]
    assert compared(placement, loads, phases=("prefill",)).verdict != "other phases"


def test_ranks_of_unequal_speed_are_compared_by_time():
    times = (1.0, 2.0)
    share = predicted_share(COPIED, np.array([TASKS]), 2, times)
    domain = PlannedLoads(share, {LAYER: share}, {LAYER: TASKS})
    placement = Placement(2, 4, {LAYER: COPIED}, domains={"tasks": domain}, row_times_W=times)
    assert share == pytest.approx(1)
    loads = run_of((TASKS, (667, 333)), row_times_W=np.array(times))
    report = compared(placement, loads)
    assert report.verdict == "kept" and report.share == pytest.approx(1, abs=0.001)
    even = compared(placement, run_of((TASKS, (500, 500)), row_times_W=np.array(times)))
    assert even.share == pytest.approx(2 / 3) and even.verdict == "uneven steps"
    assert "rows are not split by the planned times per row" in even.text[1]


def test_layers_without_a_promise_and_runs_without_rows_are_left_out():
    plan = PlanInUse(placement_for(text=TEXT), "plan.yaml")
    assert plan_drift(plan, LoadCounter(), steps=0, tokens={}) is None
    loads = run_of((TEXT, (500, 500)))
    loads.layers[5] = loads.layers[LAYER]
    report = plan_drift(plan, loads, steps=1, tokens={})
    assert report is not None and [each.layer for each in report.layers] == [LAYER]


@pytest.mark.parametrize(
    ("policy", "factor", "precision", "share", "phases"),
    [
        ("none", 1.0, "model", 1.0, ("prefill", "decode")),
        ("none", 1.0, "int4", 0.9, ("prefill", "decode")),
        ("token_drop", 1.25, "int4", 0.8, ("prefill",)),
        ("token_drop", 1.25, "model", 1.0, ("prefill",)),
    ],
)
def test_what_copies_may_take_follows_from_the_config(policy, factor, precision, share, phases):
    moe = MoEConfig(
        placement="plan.yaml",
        capacity=CapacityConfig(policy=policy, factor=factor, phases=("prefill",)),
        copies=CopiesConfig(target=0.9),
    )
    config: Any = SimpleNamespace(moe=moe)
    placement = replace(placement_for(COPIED, tasks=TASKS), precision=precision)
    plan = plan_in_use(placement, config)
    assert plan is not None
    assert (plan.low_bit_share, plan.phases, plan.file) == (share, phases, "plan.yaml")


def test_a_placement_that_promises_nothing_is_not_compared():
    config: Any = SimpleNamespace(moe=MoEConfig())
    assert plan_in_use(None, config) is None
    assert plan_in_use(placement_for(), config) is None
