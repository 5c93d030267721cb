"""The overlap bench: its arithmetic by hand, and a small run over loopback.

Run: pytest tests/tools/test_bench_overlap.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

import bench_overlap  # noqa: E402


def reply(seconds: list[float], exposed: float, digest: str = "a") -> dict:
    own = {"seconds": seconds, "median_exposed": exposed, "digest": digest}
    return own | {"bytes": 10 if digest == "a" else 30, "chosen": None}


def test_hidden_is_the_share_of_exposed_time_that_is_saved():
    ranks = [
        {"1": reply([0.4, 0.5, 0.6], 0.10), "4": reply([0.3, 0.3, 0.4], 0.02)},
        {"1": reply([0.3, 0.6, 0.5], 0.06), "4": reply([0.2, 0.4, 0.3], 0.02, "b")},
    ]
    found = bench_overlap.figures(ranks)
    assert found["1"]["hidden"] == 0 and found["1"]["speedup"] == 1 and found["1"]["equal"]
    assert found["4"]["exposed"] == pytest.approx(0.02)
    assert found["4"]["hidden"] == pytest.approx(0.75)
    assert found["4"]["seconds"]["all"] == [0.3, 0.4, 0.4], "the slower rank counts"
    assert found["4"]["speedup"] == pytest.approx(1.5)  # of 4/3, 3/2 and 3/2
    assert not found["4"]["equal"]
    assert (found["1"]["bytes"], found["4"]["bytes"]) == (10, 20)


def test_a_small_run_over_loopback_gives_equal_outputs_and_prints_the_choice_of_auto():
    command = [sys.executable, str(TOOLS / "bench_overlap.py")]
    command += "--tokens 32 --hidden 32 --ffn 16 --rounds 2 --timeout 60".split()
    result = subprocess.run(
        [*command, "--chunks", "1,3,auto,1 copies"], capture_output=True, text=True, timeout=90
    )
    assert result.returncode == 0, result.stderr
    assert "bitwise equal" in result.stdout and "auto: 1" in result.stdout
    record = json.loads(result.stdout.splitlines()[-1])
    assert list(record["chunks"]) == ["1", "3", "auto", "1 copies"]
    assert all(len(entry["seconds"]["all"]) == 2 for entry in record["chunks"].values())
