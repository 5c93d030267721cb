"""The profiler bench: its arithmetic by hand.

python -m pytest tests/tools/test_bench_profiler.py
"""

from __future__ import annotations

import bench_profiler
import pytest


def test_wall_time_is_the_slower_ranks_and_cpu_time_that_of_all():
    first = {"off": [(1.0, 0.5, 0.0), (2.0, 0.25, 0.5)], "on": [(3.0, 1.0, 0.0)]}
    second = {"off": [(1.5, 0.5, 0.3), (1.0, 0.25, 0.1)], "on": [(2.0, 2.0, 0.0)]}
    wall, cpu, inside = bench_profiler.runs([first, second])
    assert wall == {"off": [1.5, 2.0], "on": [3.0]}
    assert cpu == {"off": [1.0, 0.5], "on": [3.0]}
    assert inside == {"off": [pytest.approx(0.2), 0.25], "on": [0.0]}
