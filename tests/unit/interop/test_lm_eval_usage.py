"""Usage of an evaluation's runs, by hand. Run: pytest tests/unit/interop/test_lm_eval_usage.py"""

from __future__ import annotations

import pytest

from engine.interop.lm_eval_usage import Usage
from engine.profiling.report import LayerReport, LayerTotals, RunReport


def report(loads, max_over_mean, bound, dropped):
    layers = [
        LayerReport(
            layer=index,
            rank_max_over_mean=1.0,
            rank_max_over_mean_after=1.0,
            expert_max_over_mean=1.0,
            expert_max_over_mean_after=1.0,
            expert_loads=rows,
            expert_loads_after=rows,
        )
        for index, rows in enumerate(loads)
    ]
    totals = LayerTotals(assignments=100, dropped=dropped)
    return RunReport(
        seconds=2.0,
        steps=1,
        ranks=[],
        layers=layers,
        max_over_mean=max_over_mean,
        speed_bound=bound,
        totals=totals,
    )


def test_the_bound_of_several_runs_is_that_of_their_rows_together():
    # 2 ranks. First run: 40 rows, mean 20, slowest 30 -> 24. Second: 20 rows, mean 10, slowest 10.
    usage = Usage()
    usage.add(Usage.of(report([[30, 10]], 1.5, 30 / 24, 6), 2))
    usage.add(Usage.of(report([[5, 5], [5, 5]], 1.0, 1.0, 0), 2))
    assert (usage.mean, usage.slowest) == (30, 40)
    assert usage.slowest_after == pytest.approx(34)
    assert usage.speed_bound == pytest.approx(40 / 34)
    assert usage.share_after == pytest.approx(30 / 34)
    assert usage.drop_rate == 6 / 200
    assert usage.seconds == 4


def test_without_rows_nothing_is_lost_and_nothing_gained():
    assert (Usage().drop_rate, Usage().speed_bound, Usage().share_after) == (0, 1, 1)
