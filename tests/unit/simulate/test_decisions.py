"""engine/simulate: decisions, loads, makespan and device files against their definitions.

Run: pytest tests/unit/simulate/test_decisions.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gpu_roofline.device import DEVICES, Assumed

from engine.config import CapacityConfig
from engine.moe.placement.instances import Instances
from engine.moe.placement.placement import LayerPlacement
from engine.moe.placement.row_split import SplitRule
from engine.simulate.cost_model import makespan
from engine.simulate.decisions import LayerRules, StepCounts
from engine.simulate.device_file import read_device
from engine.simulate.exchanges import LayerExchanges
from engine.simulate.loads import even, make_traffic, over_ranks, over_replicas

LOAD_E = np.array([9, 1, 2, 0])


def rules(placement: LayerPlacement, **capacity: object) -> LayerRules:
    config = CapacityConfig(policy="token_drop", **capacity) if capacity else CapacityConfig()  # type: ignore[arg-type]
    return LayerRules(config, Instances(placement, 2), SplitRule(), layer=0, top_k=2)


def counts(load_E: np.ndarray = LOAD_E, exempt_E: np.ndarray | None = None) -> StepCounts:
    claims_WE = over_ranks(load_E, 2)
    exempt_WE = over_ranks(np.zeros_like(load_E) if exempt_E is None else exempt_E, 2)
    tokens = even(int(load_E.sum()) // 2, 2)
    return StepCounts(claims_WE=claims_WE, exempt_WE=exempt_WE, tokens_W=tokens, eligible_W=tokens)


CONTIGUOUS = LayerPlacement.contiguous(4, 2)


@pytest.mark.parametrize(
    ("capacity", "rows"),
    [
        ({}, [9, 1, 2, 0]),
        ({"factor": "1"}, [3, 1, 2, 0]),  # C = ceil(6 * 2 / 4)
        ({"factor": "1.5"}, [5, 1, 2, 0]),
        ({"factor": "1", "consensus": "quota"}, [3, 1, 2, 0]),
        ({"factor": "1", "consensus": "local"}, [4, 1, 2, 0]),  # ranks keep 2 of 5 and of 4
        ({"factor": "2"}, [9, 1, 2, 0]),  # E / K: nothing is dropped
    ],
)  # fmt: skip
def test_expert_scope_keeps_each_experts_capacity(capacity, rows):
    decided = rules(CONTIGUOUS, **capacity).decide(counts())
    assert decided.counts_WI.sum(0).tolist() == rows
    assert (decided.dropped, decided.is_exact) == (12 - sum(rows), True)


def test_rank_scope_pools_the_experts_of_a_rank():
    decided = rules(CONTIGUOUS, factor="1", scope="rank").decide(counts())
    rows_I = decided.counts_WI.sum(0)
    assert [rows_I[:2].sum(), rows_I[2:].sum()] == [6, 2] and decided.dropped == 4


def test_exempt_rows_stay_and_copies_take_the_rest():
    with_copy = LayerPlacement((0, 0, 1, 1), ((1,), (), (), ()))
    decided = rules(with_copy).decide(counts())
    assert np.add.reduceat(decided.counts_WI.sum(0), [0, 2]).tolist() == [6, 6]
    exempt = np.array([0, 4, 0, 0])
    bound = rules(with_copy, factor="1", scope="rank").decide(counts(exempt_E=exempt))
    loads = np.add.reduceat(bound.counts_WI.sum(0), [0, 2]).tolist()
    assert loads == [6 + 4, 6] and bound.dropped == 0 and not bound.is_exact


def test_rows_that_are_sent_are_those_that_are_computed():
    made = rules(LayerPlacement((0, 0, 1, 1), ((1,), (), (), ())))
    exchanged = LayerExchanges(made, 8, 2, 8).of(made.decide(counts()), counts())
    assert exchanged.load_W.sum() == exchanged.sent_W.sum() == 12
    assert exchanged.far_bytes == 0 < exchanged.near_bytes
    apart = LayerExchanges(made, 8, 2, 1).of(made.decide(counts()), counts())
    assert (apart.near_bytes, apart.far_bytes) == (0, exchanged.near_bytes)


def test_loads_are_dealt_without_loss():
    random = np.random.default_rng(0)
    assert over_replicas(LOAD_E, 3, random).sum(0).tolist() == LOAD_E.tolist()
    parts_WE = over_ranks(LOAD_E, 5)
    assert parts_WE.sum(0).tolist() == LOAD_E.tolist()
    assert np.ptp(parts_WE, axis=0).max() <= 1 and np.ptp(parts_WE.sum(1)) <= 1


def test_scaled_loads_have_the_tokens_asked_for_and_no_expert_more_than_all():
    made = make_traffic(
        "zipf:3", num_tokens=50, num_layers=2, num_experts=6, top_k=2, steps=2, seed=1
    )
    for tokens in (50, 7, 1000):
        loads = made.scaled(tokens).loads_SLE
        assert (loads.sum(2) == 2 * tokens).all() and loads.max() <= tokens
    with pytest.raises(ValueError, match="--synthetic zipf: give uniform"):
        make_traffic("zipf", num_tokens=5, num_layers=1, num_experts=6, top_k=2, steps=1, seed=1)


def test_ranks_that_share_cores_take_turns():
    seconds = np.array([3.0, 3.0, 6.0])
    assert makespan(seconds, 8, 2) == pytest.approx(7.5)
    assert makespan(seconds, 8, 3) == makespan(seconds, 8, None) == 6.0
    assert makespan(seconds, 8, 1) == pytest.approx(12.0)
    assert makespan(seconds, 1, 1) == 6.0


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_shipped_devices_are_assumed_name_sources_and_agree_with_the_roofline(name):
    device, other, assumed = read_device(name), DEVICES[name], Assumed()
    assert device.assumed and "sources:" in device.path.read_text()
    figures = device.figures
    assert figures is not None
    for own, theirs in (
        (figures.memory_gib, other.memory_gib), (figures.memory_bytes_per_s, other.memory_bytes),
        (figures.flops_per_s, other.flops), (figures.link_bytes_per_s, other.link_bytes),
        (figures.network_bytes_per_s, other.network_bytes),
        (figures.memory_share, assumed.memory_share),
        (figures.product_share, assumed.product_share), (figures.link_share, assumed.link_share),
        (figures.launch_s, assumed.launch_s), (figures.sync_s, assumed.sync_s),
        (figures.collective_s, assumed.collective_s), (figures.step_s, assumed.host_s),
    ):  # fmt: skip
        assert own == theirs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "format must be"),
        ("format: lockstep-device-1\nfigures: {}\ncosts: {}", "either figures or costs"),
        ("format: lockstep-device-1\nfigures: {memory_gib: -1}", "figures.memory_gib = -1"),
        ("format: lockstep-device-1\nfigures: {memory_gib: 1}", "memory_bytes_per_s is missing"),
        ("format: lockstep-device-1\ncosts: {gate: {}}", "missing"),
        ("format: lockstep-device-1\nspeed: 1", "unknown key 'speed'"),
        ("a: [", "is not YAML"),
    ],
)  # fmt: skip
def test_device_files_that_are_wrong_are_refused_in_words(text, words, tmp_path: Path):
    path = tmp_path / "device.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as refused:
        read_device(str(path))
    assert words in str(refused.value) and str(path) in str(refused.value)
