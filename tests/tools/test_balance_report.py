"""The balance report's pure parts: cases, calibration data, shares, demands, tables. Hand-worked.

python -m pytest tests/tools/test_balance_report.py
"""

from __future__ import annotations

import random
from dataclasses import replace

import capacity_report
import numpy as np
import pytest
from capacity import balance_tables
from capacity.balance import BalancePanel, BalanceResult, _in_proportion, share_of
from capacity.balance_cases import MIXED, ROBUST, Case, Demand, make_cases
from capacity.balance_worker import CallLog
from capacity.calibration import TASKS, draw_tasks
from capacity.jobs import TEXT, Item
from capacity.scores import Scores
from tiny.tasks import is_held_out

ITEMS = [
    Item(domain=TEXT, prompt=(0,) * 11, index=0, rank=0),
    Item(domain=TEXT, prompt=(0,) * 31, index=1, rank=1),
    Item(domain="sum", prompt=(0,) * 14, answer=(1,), index=2, rank=0),
]


def result(case, *, nll=(20.0, 90.0), hits=(1.0,), share=0.96, digest="same"):
    texts = np.array([10, 30]) if nll else np.array([], dtype=np.int64)
    return BalanceResult(
        case=case,
        scores=Scores(np.array(nll), texts, np.array(hits), np.array(["sum"] * len(hits))),
        digests={0: "same", 1: digest},
        share=share,
        share_all=share,
        planned_share=None,
        rows=90,
        dropped=10,
        copied=20,
        memory=0.16,
        seconds=1.0,
    )


def panel(*results):
    return BalancePanel(
        model="m", ranks=2, items=ITEMS, calibration={TEXT: 5}, steps=1, results=list(results)
    )


DROPLESS = result(Case())
DEMAND = Demand(share=0.95, loss=0.05, tasks=-0.25)


def test_share_is_the_mean_rank_before_over_the_most_loaded_after():
    # Two ranks, two steps of one layer: 40 and 20 rows; the most loaded ranks have 25 and 12.
    assert share_of(np.array([[40], [20]]), np.array([[[25], [8]], [[15], [12]]])) == 30 / 37


def test_each_model_and_number_of_ranks_has_its_demands():
    found = {
        (name, ranks): [
            (case.copies, case.precision, case.job)
            for case in make_cases(name, ranks, [1, 2, 4, 8])
            if case.demand is not None
        ]
        for name, ranks in (("tiny_mixtral", 8), ("tiny_olmoe", 4), ("other", 4))
    }
    whole = ("model", MIXED)
    assert found["other", 4] == [(4, *whole)]
    assert found["tiny_olmoe", 4] == [(4, *whole), (1, "int4", MIXED)]
    alone = [(8, "int4", TEXT), (8, "int4", TASKS)]
    assert found["tiny_mixtral", 8] == [(8, *whole), (8, "int4", MIXED), *alone]


def test_a_panel_starts_dropless_and_asks_for_no_more_copies_than_ranks():
    cases = make_cases("tiny_olmoe", 4, [1, 8])
    assert cases[0] == Case()
    assert max(case.copies for case in cases) == 4
    assert {case.planned_for for case in cases} == {ROBUST, MIXED, TEXT, TASKS}


def test_calibration_tasks_are_none_of_the_held_out_prompts():
    prompts = [prompt for _ in range(50) for prompt in draw_tasks(random.Random(3))]
    assert len(prompts) == 200 and not any(map(is_held_out, prompts))


def test_a_plan_in_proportion_has_the_jobs_part_of_each_kind():
    text, tasks = {5: np.array([[40, 0], [40, 0]])}, {5: np.array([[0, 40]])}
    # 42 of 56 prompt tokens are text.
    assert _in_proportion(text, tasks, ITEMS)[5].tolist() == [[30, 10]]


def test_the_call_log_keeps_every_call_and_counts_as_before():
    log = CallLog()
    log.record(
        3, before_E=np.array([4, 2]), rank_before=[4, 2], own_after=[3, 1], own_experts=[0, 1]
    )
    ((before_E, own),) = log.calls[3]
    assert before_E.tolist() == [4, 2] and own == [3, 1]
    assert log.layers[3].experts.tolist() == [4, 2]


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({"nll": (20.0, 90.05)}, True),  # 0.045% more
        ({"nll": (20.0, 90.06)}, False),
        ({"share": 0.94}, False),
        ({"hits": (0.0,)}, False),
    ],
)
def test_a_demand_is_met_where_loss_tasks_and_share_are(changes, met):
    case = Case(copies=2, precision="int4", gamma="1.05", demand=DEMAND)
    made = result(case, **changes)
    assert balance_tables.is_met(panel(DROPLESS, made), made) is met


@pytest.mark.parametrize(("digest", "met"), [("same", True), ("other", False)])
def test_an_exact_demand_needs_every_items_bits(digest, met):
    made = result(Case(copies=2, demand=Demand(share=0.95, exact=True)), digest=digest)
    assert balance_tables.is_met(panel(DROPLESS, made), made) is met


def test_prompts_alone_are_compared_with_their_part_of_dropless():
    tasks = result(Case(copies=2, gamma="1.05", job=TASKS), nll=(), hits=(0.0,))
    text = result(Case(copies=2, gamma="1.05", job=TEXT), nll=(22.0, 90.0), hits=())
    made = panel(DROPLESS, tasks, text)
    assert balance_tables.loss_added(made, tasks) is None
    assert balance_tables.tasks_added(made, tasks) == -100
    assert balance_tables.tasks_added(made, text) is None
    loss = balance_tables.loss_added(made, text)
    assert loss is not None and loss[0] == pytest.approx(100 * 2 / 110)


def test_the_tables_have_loss_and_share_of_every_case():
    case = Case(copies=2, precision="int4", gamma="1.05", demand=DEMAND)
    made = panel(DROPLESS, result(replace(case, copies=1)), result(case, nll=(20.0, 91.1)))
    text = balance_tables.panel_text(made)
    assert "1 int4 copy, Token Drop 1.05" in text and "+1.000%" in text and "! loss +0.05%" in text
    assert balance_tables.markdown([made]).count("\n") == 5
    record = balance_tables.panel_record(made)["results"][2]
    assert record["loss_added_percent"] == 1.0 and record["met"] is False
    assert record["gamma"] == "1.05" and record["share"] == 0.96


def test_steps_are_smaller_and_ranks_fewer_by_default_with_balance():
    options = capacity_report._parse(["--balance"])
    assert (options.batch_tokens, options.ranks) == (8500, [4, 8])
    options = capacity_report._parse([])
    assert (options.batch_tokens, options.ranks) == (16384, [2, 4, 8])
    with pytest.raises(ValueError, match="--calibration-steps"):
        capacity_report._parse(["--balance", "--calibration-steps", "0"])
