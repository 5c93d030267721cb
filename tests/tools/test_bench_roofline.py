"""Roofline bound and barrier cost: by hand for a small model, and plausible measured rates.

python -m pytest tests/tools/test_bench_roofline.py
"""

from __future__ import annotations

import math
import os
import shutil
import time

import pytest
import torch
from bench.barrier_cost import BarrierCost
from bench.jobs import Job
from bench.roofline import Rates, measure_rates, roofline_bound

MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 4,
    "intermediate_size": 3,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
}


def test_the_bound_is_the_larger_of_computing_and_reading():
    job = Job(name="two", prompts=((1, 2, 3), (4,)), new_tokens=2)
    # A layer: attention 4 x 2 x (2 + 2 + 1 + 1) = 48, router 8, an expert 3 x 4 x 3 = 36 weights;
    # logits 40. Tokens through the first layer: 3 + 1 and 1 + 1; pairs 10 and 3. Through the last
    # all go for keys and values, 16, and two each for the rest: pairs 3 + 4 and 1 + 2.
    flops = 2 * 6 * (48 + 8 + 36 + 16) + 2 * 4 * (32 + 8 + 36 + 40) + 4 * 2 * 2 * (13 + 10)
    # Two tokens per step, one of two experts each: three quarters of the experts.
    read = 4 * 2 * (2 * (48 + 8) + 40 + 0.75 * 2 * 2 * 36)
    found = roofline_bound(MODEL, job, 2, Rates(flops=1.0, read=1.0))
    assert (found.compute, found.read) == (flops, read)
    assert found.seconds == flops
    assert roofline_bound(MODEL, job, 2, Rates(flops=1e9, read=1.0)).seconds == read


@pytest.mark.alone
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_a_core_computes_faster_than_it_reads():
    core = sorted(os.sched_getaffinity(0))[0]
    rates = measure_rates([core], seconds=0.05)
    assert rates.flops > rates.read / 4 > 1e7


@pytest.mark.alone
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_no_product_of_matrices_beats_the_rate_of_computing():
    # A peak measured with registers that spill once came out at less than a tenth of this.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.rand(512, 512)
    rates, best = [], 0.0
    for _ in range(3):
        rates.append(measure_rates(sorted(os.sched_getaffinity(0))[:1], seconds=0.05).flops)
        begin = time.perf_counter()
        x @ x
        best = max(best, 2 * 512**3 / (time.perf_counter() - begin))
    torch.set_num_threads(before)
    assert max(rates) > best / 2


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_cores_with_barriers_keep_a_finite_share_of_their_speed(tmp_path):
    cores = sorted(os.sched_getaffinity(0))[:2]
    barrier_cost = BarrierCost(cores, tmp_path)
    assert barrier_cost.num_cores == len(cores)
    assert 0 < barrier_cost.kept_share(0.5, seconds=0.05) < math.inf


def test_without_a_compiler_the_error_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="install gcc"):
        BarrierCost([0], tmp_path)
