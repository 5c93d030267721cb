"""`tools/bench_plan.py` and the loads that it makes. Run: pytest tests/tools/test_bench_plan.py"""

from __future__ import annotations

import json

import bench_plan
import numpy as np
import pytest
from bench.drifting_loads import drifting_loads

SMALL = "--layers 1 --experts 16 --ranks 4 --copies 4 --steps 12 --processes 1".split()


def test_a_plan_beats_what_knows_mean_loads_alone(capsys):
    assert bench_plan.main([*SMALL, "--want", "0.9"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    shares = json.loads(lines[-1])["shares"]
    assert shares["contiguous"]["later"] < shares["planned"]["later"]
    assert shares["greedy"]["first"] <= shares["planned"]["first"] + 1e-3


def test_a_share_that_is_not_reached_is_the_exit_code(capsys):
    assert bench_plan.main([*SMALL, "--want", "1.01"]) == 1


def test_every_step_has_its_rows_and_a_seed_its_loads():
    loads_SE = drifting_loads(5, 8, 100, seed=3)
    assert (loads_SE.sum(1) == 100).all()
    assert np.array_equal(loads_SE, drifting_loads(5, 8, 100, seed=3))


def test_loads_drift_from_step_to_step_and_forget():
    loads_SE = drifting_loads(400, 32, 10**7, drift=0.3, memory=5.0)
    logs_SE = np.log(loads_SE / loads_SE.mean(0))
    near, far = (float(np.mean(logs_SE[:-gap] * logs_SE[gap:]) / logs_SE.var()) for gap in (1, 40))
    assert near == pytest.approx(np.exp(-1 / 5), abs=0.05) and abs(far) < 0.1


def test_greedy_hosts_are_on_different_ranks():
    layer = bench_plan.greedy_layer(drifting_loads(4, 16, 4000), 4, 8)
    assert layer.problems(4) == [] and layer.num_copies == 8
