"""tools/bench_quantised.py: the error of rounding, and a short real run.

Run: pytest tests/tools/test_bench_quantised.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]

import bench_quantised  # noqa: E402


def run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/bench_quantised.py", "--rounds", "2", "--repeats", "1"]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)


def test_errors_are_of_the_experts_alone(tmp_path):
    weight = torch.randn(16, 64)
    save_file(
        {"layers.0.experts.0.w1": weight, "layers.0.gate": 1e6 * weight}, tmp_path / "m.safetensors"
    )
    found = bench_quantised.checkpoint_errors(tmp_path, 32)
    assert 0.001 < found["int8"] < 0.01 and 0.05 < found["int4"] < 0.09


def test_a_checkpoint_without_experts_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"--checkpoints .*: no \*.safetensors there"):
        bench_quantised.checkpoint_errors(tmp_path, 32)


def test_a_short_run_prints_a_table_and_one_json_line():
    done = run("--sizes", "64x32", "--rows", "1,20", "--experts", "2", "--threads", "1")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    cases = record["cases"]["64x32"]
    assert set(cases) == {"1", "20"} and set(cases["1"]) == {"float32", "int8", "int4"}
    assert all(figures["speedup"]["median"] > 0 for figures in cases["20"].values())
    assert "2 experts 64x32, processor time" in done.stdout


def test_processor_time_of_several_threads_is_refused():
    done = run("--clock", "processor", "--threads", "2")
    assert done.returncode == 2 and "--clock processor: measures one thread" in done.stderr
