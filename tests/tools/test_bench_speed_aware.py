"""tools/bench_speed_aware.py: its arithmetic on hand-made replies, and a short real run.

Run: pytest tests/tools/test_bench_speed_aware.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

import bench_speed_aware  # noqa: E402


def reply(even: list[float], aware: list[float], rows: tuple[int, int]) -> dict:
    def entry(seconds, count, dropped):
        return {"seconds": seconds, "experts": seconds, "rows": [count] * 2, "dropped": dropped}

    return {"even": entry(even, rows[0], 50), "speed_aware": entry(aware, rows[1], 40)}


def test_a_layer_takes_its_slower_rank_and_speedups_are_of_the_same_round():
    ranks = [reply([1.0, 4.0], [1.0, 1.0], (60, 80)), reply([2.0, 2.0], [0.5, 3.0], (60, 40))]
    found = bench_speed_aware.figures(ranks, num_assignments=200, rounds=2)
    assert found["even"]["seconds"]["all"] == [2.0, 4.0]
    assert found["speed_aware"]["seconds"]["all"] == [1.0, 3.0]
    assert found["speed_aware"]["speedup"] == pytest.approx((2 / 1 + 4 / 3) / 2)
    assert found["speed_aware"]["rows"] == [80, 40]
    assert found["even"]["dropped"] == 100 / 2 / 200


@pytest.mark.alone  # speed weights follow measured speeds, which another test would change
def test_a_short_run_drops_as_much_either_way_and_prints_one_json_line():
    command = [sys.executable, "tools/bench_speed_aware.py", "--cpu-hogs", "0", "--rounds", "2"]
    small = ["--tokens", "256", "--hidden", "32", "--ffn", "32"]
    out = subprocess.run(
        [*command, *small], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    ).stdout
    record = json.loads(out.splitlines()[-1])
    capacities = record["capacities"]
    assert list(capacities) == ["dropless", "even", "speed_aware"]
    assert capacities["dropless"]["dropped"] == 0
    # 0.75 of a balanced load: a quarter of all assignments is dropped.
    for name in ("even", "speed_aware"):
        assert capacities[name]["dropped"] == pytest.approx(0.25, abs=0.02)
    assert record["hardware"] and record["commit"]
