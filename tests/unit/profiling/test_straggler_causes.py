"""Straggler analysis and its findings on simulated ranks whose causes are known.

Run: pytest tests/unit/profiling/test_straggler_causes.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.profiling.findings import Finding, HotExpert, findings
from engine.profiling.straggler_causes import Analysis, analyse
from tests.helpers.profiles import Simulation
from tests.helpers.texts import missing_from

HOT = {rank: HotExpert(layer=7, expert=24, over_mean=4.1) for rank in range(4)}


def simulate(
    change: Any = lambda turn, step: None,
    *,
    ranks: int = 4,
    steps: int = 200,
    transfer: float = 0.0,
    length: float = 1.0,
) -> Simulation:
    """Ranks that are alike but for what `change(turn, step)` does to a step's numbers.

    length: of everything that ranks do, as a multiple; a step of one takes about 5 ms.
    """
    simulation = Simulation(ranks)
    for turn in range(steps):
        rows = [50 + 10 * (turn % 5)] * ranks
        step: dict[str, Any] = {
            "host": [0.5] * ranks,
            "tokens": [16] * ranks,
            "rows": rows,
            "attention_per_token": [0.05] * ranks,
            "experts_per_row": [0.05] * ranks,
        }
        # By chance every rank is the straggler in turn.
        step["host"][turn % ranks] += 0.2
        change(turn, step)
        pairs = zip(step["tokens"], step.pop("attention_per_token"), strict=True)
        attention = [tokens * cost * length for tokens, cost in pairs]
        pairs = zip(step["rows"], step.pop("experts_per_row"), strict=True)
        experts = [rows * cost * length for rows, cost in pairs]
        step["host"] = [host * length for host in step["host"]]
        simulation.step(**step, attention=attention, experts=experts, transfer=transfer)
    return simulation


def run(*args: Any, **kwargs: Any) -> tuple[Analysis, list[Finding]]:
    """Simulate and analyse."""
    simulation = simulate(*args, **kwargs)
    analysis = analyse(
        simulation.profiles(), simulation.wait_attribution(), simulation.imbalance_L()
    )
    return analysis, findings(analysis, HOT)


def test_ranks_that_are_stragglers_by_chance_alone_are_balanced():
    analysis, found = run()
    assert [each.cause for each in found] == ["balanced"] and found[0].ranks == []
    assert all(rank.relative_compute_time == pytest.approx(1) for rank in analysis.ranks)
    assert all(rank.straggler_share < 0.5 for rank in analysis.ranks)


def test_a_hot_rank_is_named_with_its_load_and_its_hottest_expert():
    def hot(turn, step):
        step["rows"] = [50, 50, 50, 150]

    analysis, (finding, *rest) = run(hot)
    assert finding.cause == "load" and finding.ranks == [3] and finding.layer == 7 and not rest
    assert finding.text == (
        "rank 3 is the straggler in 100% of the steps, which takes 40% of the time: its experts "
        "have 2.0x the mean load (layer 7, expert 24 alone 4.1x); copies of hot experts, "
        "planned from a recording of these loads (profiler.routing, then tools/plan_placement.py), "
        "balance it; or moe.capacity.policy = token_drop with scope = rank bounds it"
    )
    assert analysis.ranks[3].straggler_share == 1 and analysis.ranks[3].relative_load == 2
    assert analysis.ranks[3].relative_compute_time == pytest.approx(1, abs=0.01)
    # 7.5 ms of experts against a mean of 3.75: the difference is waited for, step by step.
    assert analysis.wait_caused["load"] == pytest.approx(198 * 3.75e-3, rel=0.02)


def test_a_hot_copy_is_named_as_such_and_the_advice_is_to_plan_again():
    def hot(turn, step):
        step["rows"] = [50, 50, 50, 150]

    simulation = simulate(hot)
    analysis = analyse(
        simulation.profiles(), simulation.wait_attribution(), simulation.imbalance_L()
    )
    copy = {3: HotExpert(layer=7, expert=24, over_mean=4.1, is_copy=True)}
    (finding,) = findings(analysis, copy, "token_drop", has_copies=True)
    assert not missing_from(
        finding.text,
        "(layer 7, its copy of expert 24 alone 4.1x)",
        "more copies, planned for a recording of these loads",
        "or a smaller moe.capacity.factor bounds it further",
    )


def test_loads_that_are_hot_in_turn_are_reported_without_naming_a_rank():
    def in_turn(turn, step):
        step["rows"] = [150 if turn % 4 == rank else 50 for rank in range(4)]

    _, (finding, *rest) = run(in_turn)
    assert finding.cause == "load" and finding.ranks == [] and not rest
    assert "changes from step to step" in finding.text


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_slow_device_is_named_with_how_much_slower_it_is_at_equal_load(ranks):
    def slow(turn, step):
        step["attention_per_token"][1] *= 1.31
        step["experts_per_row"][1] *= 1.31

    analysis, (finding, *rest) = run(slow, ranks=ranks, length=10)
    assert finding.cause == "device" and finding.ranks == [1] and not rest
    assert not missing_from(finding.text, "rank 1 on h1", "31%")
    assert analysis.ranks[1].relative_compute_time == pytest.approx(1.31, abs=0.01)
    assert all(b.relative_compute_time < 1.01 for b in analysis.ranks if b.rank != 1)


def test_each_layers_wait_is_split_by_cause_and_sums_to_the_runs():
    def both(turn, step):
        step["rows"] = [160, 40, 40, 40]
        step["experts_per_row"][2] *= 2
        step["attention_per_token"][2] *= 2

    analysis, _ = run(both, length=100, transfer=4.0)
    (layer,) = analysis.layer_causes
    assert set(layer) == {"load", "tokens", "device", "host", "network"}
    for cause in ("load", "device", "network"):  # of the one layer, as nearly all of it is
        assert layer[cause] == pytest.approx(analysis.wait_caused[cause], rel=0.1)
        assert layer[cause] > 0
    assert layer["host"] <= analysis.wait_caused["host"] + 1e-9


def test_a_balanced_layer_has_next_to_nothing_to_split():
    analysis, _ = run(length=100)
    (layer,) = analysis.layer_causes
    assert sum(layer.values()) < 0.05 * analysis.seconds
    assert all(value >= 0 for value in layer.values())


def test_a_rank_that_is_a_little_slower_is_named_once_chance_would_not_last_that_long():
    def slow(turn, step):
        step["attention_per_token"][1] *= 1.16
        step["experts_per_row"][1] *= 1.16

    analysis, (finding,) = run(slow, length=4)
    assert 3 < analysis.seconds < 6 and finding.cause == "balanced"
    analysis, (finding,) = run(slow, length=50)
    assert analysis.seconds > 40 and finding.cause == "device" and finding.ranks == [1]


def test_a_slow_device_with_few_rows_is_distinguished_from_a_hot_rank():
    def both(turn, step):
        step["rows"] = [160, 40, 40, 40]
        step["experts_per_row"][2] *= 2
        step["attention_per_token"][2] *= 2

    analysis, found = run(both, length=100)
    by_cause = {each.cause: each.ranks for each in found}
    assert by_cause["load"] == [0] and by_cause["device"] == [2]
    assert analysis.ranks[0].relative_compute_time == pytest.approx(1, abs=0.02)


def test_a_host_that_is_slow_between_the_layers_is_named_with_its_milliseconds():
    def busy(turn, step):
        step["host"][2] += 3.0

    _, (finding, *rest) = run(busy)
    assert finding.cause == "host" and finding.ranks == [2] and not rest
    assert not missing_from(finding.text, "3.6 ms", "the others 0.6")


def test_stalls_of_a_few_steps_are_the_hosts_wherever_they_strike():
    def stall(turn, step):
        if turn % 50 == 49:
            step["experts_per_row"][0] += 10.0

    analysis, (finding, *rest) = run(stall)
    assert finding.cause == "host" and finding.ranks == [0] and not rest
    assert analysis.ranks[0].stalled_steps is not None and analysis.ranks[0].stalled_steps[0] == 4
    assert "in 4 steps" in finding.text
    # 60 * 10 ms more in the experts; by chance it arrives a little later or earlier.
    assert analysis.ranks[0].stalled_steps[1] == pytest.approx(0.9, rel=0.02)


def test_unequal_tokens_in_attention_are_not_a_slow_device():
    def unequal(turn, step):
        step["tokens"] = [64 if rank == 1 else 16 for rank in range(4)]

    analysis, (finding, *rest) = run(unequal)
    assert finding.cause == "tokens" and finding.ranks == [1] and not rest
    assert analysis.ranks[1].relative_compute_time == pytest.approx(1, abs=0.01)


def test_a_slow_network_is_reported_with_its_rate_and_no_rank():
    analysis, (finding, *rest) = run(transfer=4.0)
    assert finding.cause == "network" and finding.ranks == [] and not rest
    # 1,000 bytes out and 1,000 back a step, 4 ms each.
    assert analysis.bytes_per_second == pytest.approx(1000 / 4e-3, rel=0.02)
    assert analysis.share("network") > 0.4


def test_the_network_between_two_hosts_is_named_by_them():
    _, (finding,) = run(transfer=4.0, ranks=2)
    assert finding.cause == "network" and not missing_from(finding.text, "h0", "h1")


def test_the_causes_sum_to_the_wait_that_was_attributed():
    def trouble(turn, step):
        step["rows"] = [150, 50, 50, 50]
        step["experts_per_row"][1] *= 5
        step["host"][2] += 5.0

    simulation = simulate(trouble)
    attribution = simulation.wait_attribution()
    analysis = analyse(simulation.profiles(), attribution, simulation.imbalance_L())
    waiting = sum(value for cause, value in analysis.wait_caused.items() if cause != "network")
    assert waiting == pytest.approx(attribution.seconds.sum()) and waiting > 0.5
    for rank, waited in zip(analysis.ranks, attribution.seconds.sum((1, 2)), strict=True):
        assert sum(rank.wait_caused.values()) == pytest.approx(waited)


def test_one_rank_waits_for_no_other_and_a_short_run_is_reported_as_such():
    _, (alone,) = run(ranks=1)
    assert alone.cause == "balanced" and "one rank" in alone.text
    _, (short,) = run(steps=5)
    assert short.cause == "unknown" and "run too short" in short.text


def test_nothing_is_found_where_nothing_was_timed():
    simulation = Simulation(2)
    simulation.imbalance = [1.0, 1.0]
    analysis = analyse(
        simulation.profiles(), simulation.wait_attribution(), simulation.imbalance_L()
    )
    assert findings(analysis, HOT) == []


def test_time_in_which_a_process_did_not_run_is_its_hosts_wherever_the_others_waited():
    """Stopped in the middle of a combine: all leave it late, which looks like the network."""
    simulation = simulate(steps=100)
    for _ in range(10):  # 0.4 s each
        simulation.step(
            host=[0.5] * 4,
            attention=[0.8] * 4,
            experts=[2.5] * 4,
            tokens=[16] * 4,
            rows=[50] * 4,
            transfer=200.0,
        )
    profiles = simulation.profiles()

    def analysed() -> tuple[Analysis, list[Finding]]:
        analysis = analyse(profiles, simulation.wait_attribution(), simulation.imbalance_L())
        return analysis, findings(analysis, HOT)

    analysis, (finding, *_) = analysed()
    assert finding.cause == "network", "so it looks"
    before = sum(analysis.wait_caused.values())
    profiles[2] = replace(profiles[2], process_stalls=(10, 4.0))
    analysis, (finding, *_) = analysed()
    assert (finding.cause, finding.ranks) == ("host", [2])
    assert not missing_from(finding.text, "10 times", "400 ms each")
    assert sum(analysis.wait_caused.values()) == pytest.approx(before), "nothing is counted twice"
    assert analysis.ranks[2].wait_caused["host"] == pytest.approx(3.0, abs=0.2)
    assert analysis.wait_caused["network"] == pytest.approx(1.0, abs=0.2)


def test_a_process_stall_that_delayed_a_rank_is_counted_once():
    def stopped(turn, step):
        if turn % 10 == 0:
            step["host"][1] += 100.0

    simulation = simulate(stopped)
    profiles = simulation.profiles()
    profiles[1] = replace(profiles[1], process_stalls=(20, 2.0))
    analysis = analyse(profiles, simulation.wait_attribution(), simulation.imbalance_L())
    assert analysis.ranks[1].wait_caused["host"] == pytest.approx(1.5, rel=0.05)
    (finding,) = findings(analysis, HOT)
    assert (finding.cause, finding.ranks) == ("host", [1])
    assert not missing_from(finding.text, "20 times", "100 ms each")
