"""The layer bench under capacity: loads by name, simulated ranks, and one run on two real ranks.

python -m pytest tests/tools/test_bench_capacity.py
"""

from __future__ import annotations

import json
from pathlib import Path

import bench_moe_layer
import numpy as np
import pytest
import torch
from bench.capacity_mode import make_loads, policies, slack_name
from bench.moe_case import MoEShape, make_weights
from bench.simulated_layer import SimulatedLayer
from bench.simulated_mode import simulated_case, simulated_text
from bench.simulated_rank import AnsweredCollectives, Unanswered
from bench.simulated_ranks import Agreed, PolicyTime, SimulatedRanks
from bench.transfers import Transfers

from engine.config import CapacityConfig
from tests.helpers.loads import cap_loads, overloaded_rank_loads, rank_loads, zipf_loads

SMALL = MoEShape(hidden=16, ffn=8, experts=8, top_k=2)
FREE = Transfers((0, 1), (0.0, 0.0))
NO_COST = {"all_to_all": FREE, "all_gather": FREE, "all_reduce": FREE}


def agree(num_ranks: int, loads: np.ndarray, **settings: str) -> Agreed:
    ranks = SimulatedRanks(SMALL, make_weights(SMALL), num_ranks, loads)
    return ranks.agree(CapacityConfig(**settings))


def test_every_policy_of_the_table_is_a_valid_setting_and_the_last_cannot_bind() -> None:
    for experts, top_k, slack in ((8, 2, "4"), (60, 4, "15"), (7, 2, "4")):
        shape = MoEShape(experts=experts, top_k=top_k)
        found = policies(shape, ["2", "1"])
        assert all(CapacityConfig(**fields) for fields in found.values())
        assert found[slack_name(shape)]["factor"] == slack


def test_loads_are_made_by_name() -> None:
    assert make_loads("zipf1.0", SMALL, 64, 2, None)["zipf1.0"].tolist() == (
        zipf_loads(64, 8, 2, 1.0).tolist()
    )
    assert make_loads("hot1.6", SMALL, 64, 2, None)["hot1.6"].tolist() == (
        overloaded_rank_loads(64, 8, 2, 1.6, 2).tolist()
    )
    assert set(make_loads("uniform", SMALL, 64, 2, None)["uniform"].tolist()) == {16}


@pytest.mark.parametrize("name", ["zipf", "zip1.0", "cold", ""])
def test_loads_of_an_unknown_name_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be uniform, zipfS, hotR"):
        make_loads(name, SMALL, 64, 2, None)


def test_recorded_loads_are_scaled_to_the_bench_and_must_fit_its_experts(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    layers = [{"layer": 3, "expert_loads": [6, 2, 2, 2, 1, 1, 1, 1]}]
    path.write_text(json.dumps({"run": {"layers": layers}}))
    found = make_loads("recorded", SMALL, 64, 2, path)
    assert found["recorded layer 3"].tolist() == [48, 16, 16, 16, 8, 8, 8, 8]
    with pytest.raises(ValueError, match="has 8 experts, the bench 4; pass --experts 8"):
        make_loads("recorded", MoEShape(experts=4), 64, 2, path)
    with pytest.raises(ValueError, match="needs --recorded"):
        make_loads("recorded", SMALL, 64, 2, None)


def test_transfers_are_interpolated_and_grow_in_proportion_beyond_the_table() -> None:
    transfers = Transfers((0, 100, 300), (1.0, 2.0, 6.0))
    assert [transfers.of(each) for each in (0, 50, 200, 300, 600)] == [1.0, 1.5, 4.0, 6.0, 12.0]


def test_a_collective_without_an_answer_is_raised_and_answers_are_copies() -> None:
    collectives = AnsweredCollectives(0, 2)
    answer = torch.zeros(2, 3)
    collectives.rewind([answer])
    collectives.all_gather(torch.ones(3)).wait()[0] = 7
    assert not answer.any()
    with pytest.raises(Unanswered) as asked:
        collectives.all_reduce(torch.ones(4))
    assert asked.value.kind == "all_reduce" and asked.value.part.shape == (4,)


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
@pytest.mark.parametrize("selection", ["gather", "radix"])
def test_simulated_ranks_keep_what_the_policy_keeps(num_ranks: int, selection: str) -> None:
    loads = zipf_loads(96, 8, 2, 1.0)
    agreed = agree(num_ranks, loads, policy="token_drop", factor="1", selection=selection)
    kept = cap_loads(loads, "1", 96, 2)
    found = [count for plan in agreed.plans for count in plan.expert_counts]
    assert found == kept.tolist()
    assert agreed.rows == rank_loads(kept, num_ranks).tolist()


def test_simulated_ranks_know_the_collectives_and_bytes_of_an_agreement() -> None:
    loads = zipf_loads(96, 8, 2, 1.0)
    assert agree(4, loads).calls == [("all_gather", 8 * 8)]  # int64 loads of 8 experts
    radix = agree(4, loads, policy="token_drop", factor="1", selection="radix").calls
    assert [kind for kind, _ in radix] == ["all_reduce"] * 5 + ["all_gather"]


def test_the_busiest_rank_is_the_one_that_sends_or_receives_most() -> None:
    agreed = agree(2, overloaded_rank_loads(96, 8, 2, 1.6, 2))
    first, second = agreed.plans
    crossing = [first.send_splits[1], second.send_splits[0]]
    assert sum(first.send_splits) == sum(second.send_splits) == 96
    assert agreed.busiest_rows() == max(crossing) == second.send_splits[0]


def test_a_simulated_layer_takes_its_slowest_ranks_and_its_collectives() -> None:
    time = PolicyTime((1.0, 4.0), (3.0, 2.0), 0.5, (10, 20))
    assert time.seconds == 4.0 + 3.0 + 0.5


def test_the_simulation_times_every_policy_and_is_labelled() -> None:
    loads = overloaded_rank_loads(64, 8, 2, 1.6, 4)
    weights = make_weights(SMALL)
    figures = simulated_case(SMALL, weights, 4, loads, ["1"], NO_COST, rounds=1, seed=0)
    assert list(figures) == list(policies(SMALL, ["1"]))
    assert all(entry["virtual"] and entry["seconds"] > 0 for entry in figures.values())
    # 1.6 times the mean rank's 32 rows; C = 16, so the pool of its two experts holds 32.
    assert figures["none"]["rows"] == (51, 26, 26, 25)
    assert figures["token_drop rank 1"]["rows"] == (32, 26, 26, 25)
    assert figures["token_drop rank 1"]["bound"] == 51 / 32
    assert "SIMULATED" in simulated_text("hot1.6", loads, 16, 4, figures)


def test_counts_alone_can_be_timed_with_ranks_that_send_or_receive_nothing() -> None:
    layer = SimulatedLayer(SMALL, 4)
    before = np.zeros((4, 8), dtype=np.int64)
    before[0, :2] = 6
    before[1, 2] = 4
    more = before.copy()
    more[0, 1] = 9  # extras: more rows than K per token
    transfers = Transfers((0, 1000), (0.0, 1.0))
    first, second = layer.compare([before, more], transfers, rounds=1)
    assert len(first.rank_seconds) == 4
    # Nothing of rank 0's leaves it: its experts are 0 and 1. Rank 1 keeps expert 2's.
    assert first.collective_seconds == second.collective_seconds == 0.0
    before[3, 0] = 2  # two rows of 16 float32, dispatched and combined
    assert layer.time(before, transfers).collective_seconds == pytest.approx(2 * 0.128)


def test_two_real_ranks_measure_every_policy(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = "--capacity --tokens 48 --hidden 16 --ffn 8 --rounds 1 --gammas 1 --loads zipf1.0"
    assert bench_moe_layer.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    record = json.loads(text.splitlines()[-1])
    figures = record["cases"]["zipf1.0"]["policies"]
    loads = zipf_loads(96, 8, 2, 1.0)
    kept = cap_loads(loads, "1", 96, 2)
    assert figures["none"]["rows"] == rank_loads(loads, 2).tolist()
    for name in ("token_drop expert 1", "token_drop expert 1 quota", "token_drop expert 1 radix"):
        assert figures[name]["rows"] == rank_loads(kept, 2).tolist()
        bound = rank_loads(loads, 2).max() / rank_loads(kept, 2).max()
        assert figures[name]["bound"] == pytest.approx(bound)
        assert figures[name]["dropped"] == pytest.approx(1 - kept.sum() / loads.sum())
        assert not figures[name]["equal_to_dropless"]
    assert (
        figures["token_drop expert 1"]["digest"] == figures["token_drop expert 1 radix"]["digest"]
    )
    assert figures[slack_name(SMALL)]["equal_to_dropless"]
    assert "against none" in text and "outputs bitwise equal" in text
    assert "agreement of token_drop rank 1, ms: global" in text
    assert (tmp_path / "bench_moe_capacity.json").is_file()
