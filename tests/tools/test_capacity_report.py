"""The capacity report's pure parts: jobs, settings, speed, scores, findings, tables. Hand-worked.

python -m pytest tests/tools/test_capacity_report.py
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import exp, inf, sqrt
from types import SimpleNamespace

import capacity_report
import numpy as np
import pytest
from capacity import figure, timing
from capacity.findings import Finding, Pair, at_speed, findings
from capacity.jobs import (
    Item,
    assign_domains,
    assign_round_robin,
    composition,
    domains_of_ranks,
    read_items,
)
from capacity.panel import Panel, check_reference, engine_settings, to_result
from capacity.scores import Difference, Scores, blend, collect, difference
from capacity.settings import default_grid, domain_grid, from_json, full_grid, label, to_json
from capacity.speed import CallLoads, Speed, front, merge_calls, rank_rows, speed
from capacity.tables import markdown, orphan_share, panel_fronts, panel_record, panel_text
from capacity.timing import TimedShape, fullest_step, scaled, time_panel

from engine.config import CapacityConfig, Config, ModelConfig, MoEConfig

DROPLESS = CapacityConfig()
DROP = CapacityConfig(policy="token_drop", factor="1")


def scores(nll=(20.0, 90.0), tokens=(10, 30), hits=(1, 0, 1, 1), tasks=("a", "a", "b", "b")):
    return Scores(
        np.array(nll, dtype=np.float64),
        np.array(tokens),
        np.array(hits, dtype=np.float64),
        np.array(tasks),
    )


RANDOM = replace(DROP, order="random")
WORSE = scores(nll=(22.0, 96.0))  # every token by 0.2 nats: certain


def result(setting, *, of=None, bound=1.0, perfect=2.0, dropped=10, orphans=0):
    """What one run of `setting` gave: 100 assignments under capacity of top-2 tokens."""
    replies = [
        {
            "scored": [],
            "generated": [],
            "mass": [1.0, 1.0],
            "before": [],
            "after": [],
            "steps": [],
            "top_k": 2,
            "seconds": 1.0,
            "bytes_sent": 0,
            "layers": [
                {"assignments": 100, "dropped": dropped, "added": 0, "orphans": orphans, "layer": 0}
            ],
        }
    ]
    made = to_result([], setting, replies)
    return replace(made, scores=of or scores(), speed=Speed(bound, perfect))


def panel(*results, ranks=2):
    items = [
        Item(domain="text", prompt=(1, 2, 3), index=0, rank=0),
        Item(domain="a", prompt=(1, 2), answer=(3, 4), index=1, rank=1),
    ]
    return Panel(model="tiny", ranks=ranks, items=items, results=[*results])


# --- speed -------------------------------------------------------------------------------------


def call(before, after):
    """One layer call of two ranks with two experts each; all rows come from rank 0."""
    zeros = [0] * 4
    return CallLoads(np.array([before, zeros]), np.array([after, zeros]))


def test_speed_bound_divides_the_slowest_rank_before_by_the_slowest_after():
    found = speed([call([20, 10, 4, 6], [14, 10, 4, 6])])
    assert found == Speed(30 / 24, 30 / 20)
    assert found.share_of_perfect == pytest.approx(0.6)


def test_speed_bound_sums_over_calls_before_it_divides():
    # Slowest ranks 30 and 10 before, 24 and 10 after; the second call is balanced already.
    found = speed([call([20, 10, 4, 6], [14, 10, 4, 6]), call([5, 5, 5, 5], [5, 5, 5, 5])])
    assert found.bound == pytest.approx(40 / 34)
    assert found.perfect == pytest.approx(40 / 30)


def test_dropping_more_than_balance_needs_gains_more_than_perfect_balance():
    share = speed([call([20, 10, 4, 6], [5, 5, 4, 6])]).share_of_perfect
    assert share == pytest.approx((1 - 10 / 30) / (1 - 20 / 30))


def test_nothing_can_be_gained_where_loads_are_balanced():
    assert speed([call([5, 5, 5, 5], [2, 2, 2, 2])]).share_of_perfect is None
    assert speed([]) == Speed(1.0, 1.0)


def test_experts_that_do_not_divide_belong_to_the_first_ranks():
    counts_WE = np.zeros((3, 7), dtype=np.int64)
    counts_WE[1] = [1, 2, 3, 10, 20, 100, 200]
    assert rank_rows(counts_WE).tolist() == [6, 30, 300]


def test_merged_loads_take_each_ranks_own_row_with_its_extras():
    before = [[[3, 1], [2, 2]]]
    (merged,) = merge_calls(before, [[[2, 1]], [[2, 5]]])
    assert merged.before_WE.tolist() == before[0]
    assert merged.after_WE.tolist() == [[2, 1], [2, 5]]


def test_ranks_that_recorded_different_calls_are_refused():
    with pytest.raises(ValueError, match="different numbers"):
        merge_calls([[[1]]], [[[1]], []])


def test_front_holds_what_no_other_point_beats():
    points = [(1.0, 5.0), (1.5, 5.0), (1.4, 4.9), (2.0, 3.0), (2.0, 4.0), (1.2, 2.0)]
    assert front(points) == [1, 4]
    assert front([(1.0, 1.0), (1.0, 1.0)]) == [0]
    assert front([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]) == [0, 1, 2]
    assert front([]) == []


# --- settings ----------------------------------------------------------------------------------

GRIDS = [
    default_grid(["2", "1"], ["1", "0.5"]),
    domain_grid(["2", "1"]),
    full_grid(["2", "1"]),
]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_starts_dropless_and_holds_each_setting_once(grid):
    assert grid[0] == DROPLESS
    assert len(set(grid)) == len(grid)
    assert all(setting.policy != "none" for setting in grid[1:])


@pytest.mark.parametrize("grid", GRIDS)
def test_no_setting_of_a_grid_raises_an_error(grid):
    for setting in grid:  # Config refuses contradictions
        Config(model=ModelConfig(path="x"), moe=MoEConfig(capacity=setting))


@pytest.mark.parametrize("grid", GRIDS)
def test_labels_are_unique_per_setting_and_json_restores_it(grid):
    assert len({label(setting) for setting in grid}) == len(grid)
    assert [from_json(json.loads(json.dumps(to_json(setting)))) for setting in grid] == grid


def test_the_default_grid_varies_one_factor_at_a_time():
    grid = default_grid(["1"], ["1"], scopes=("expert",))
    rest = [to_json(setting) for setting in grid[1:]]
    bases = [to_json(replace(DROP, policy=policy)) for policy in ("token_drop", "expanded_drop")]
    for setting in rest:
        assert any(sum(setting[key] != base[key] for key in base) <= 1 for base in bases)


def test_with_one_expert_per_rank_no_setting_pools_a_ranks_experts():
    for domains, full in ((False, False), (True, False), (False, True)):
        options = capacity_report._parse(["--domains"] * domains + ["--full"] * full)
        grid = capacity_report.make_grid(options, num_experts=8, ranks=8)
        assert {setting.scope for setting in grid} == {"expert"}
        pooled = capacity_report.make_grid(options, num_experts=8, ranks=4)
        assert {setting.scope for setting in pooled} == {"expert", "rank"}


def test_an_unknown_phase_or_capacity_key_is_refused(capsys):
    with pytest.raises(SystemExit):
        capacity_report._parse(["--phases", "prefil"])
    assert "prefil" in capsys.readouterr().err
    with pytest.raises(ValueError, match="factr"):
        from_json({"factr": 1})


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--gammas", "1,zero"], "moe.capacity.factor = 'zero'"),
        (["--ranks", "2,16"], "--ranks 16: must be from 2 to tiny_mixtral_ep8's 8 experts"),
        (["--config", "tiny_mixtrel_ep8"], "did you mean tiny_mixtral_ep"),
        (["--set", "moe.experts.backnd=torch"], "backnd"),
    ],
)
def test_what_cannot_run_is_refused_before_any_rank_starts(arguments, problem, monkeypatch):
    monkeypatch.setattr(capacity_report, "run_panel", None)
    with pytest.raises(ValueError, match=re.escape(problem)):
        capacity_report.main(["--config", "tiny_mixtral_ep8", "--limit", "2", *arguments])


# --- the job -----------------------------------------------------------------------------------


def write_data(folder, texts=3, per_task=2):
    rows = [{"id": f"text-{i}", "prompt": "x" * (4 + i)} for i in range(texts)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [
        {"id": f"{task}-{i}", "task": task, "prompt": f"{task}{i}", "answer": " ok"}
        for task in ("sum", "copy")
        for i in range(per_task)
    ]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def encode(text, special):
    return [0] * special + [ord(letter) for letter in text]


def test_items_hold_the_prompts_with_bos_and_the_answers_with_eos(tmp_path):
    write_data(tmp_path)
    items = read_items(tmp_path, encode, eos_id=1)
    assert [item.domain for item in items] == ["text"] * 3 + ["sum"] * 2 + ["copy"] * 2
    assert items[0].prompt == (0, *map(ord, "xxxx")) and items[0].answer is None
    assert items[3].prompt == (0, *map(ord, "sum0")) and items[3].answer == (*map(ord, " ok"), 1)


def test_the_limit_holds_for_each_domain(tmp_path):
    write_data(tmp_path)
    items = read_items(tmp_path, encode, eos_id=1, limit=1)
    assert [item.domain for item in items] == ["text", "sum", "copy"]


def make_items(**lengths):
    """`lengths`: domain=(items, tokens of each)."""
    return [
        Item(domain=domain, prompt=(5,) * size, answer=None if domain == "text" else (1,))
        for domain, (count, size) in lengths.items()
        for _ in range(count)
    ]


def test_mixed_items_are_shuffled_numbered_and_assigned_round_robin():
    items = [Item(domain="text", prompt=(number,)) for number in range(10)]
    assigned = assign_round_robin(items, 4, seed=0)
    assert [item.index for item in assigned] == list(range(10))
    assert [item.rank for item in assigned] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    order = [item.prompt[0] for item in assigned]
    assert sorted(order) == list(range(10)) and order != list(range(10))
    assert assigned == assign_round_robin(items, 4, seed=0) != assign_round_robin(items, 4, seed=1)


def test_few_ranks_share_the_domains_by_size_and_more_split_the_largest():
    tokens = {"text": 40, "recall": 5, "copy": 3, "sum": 2}
    assert domains_of_ranks(tokens, 2) == [{"text"}, {"recall", "copy", "sum"}]
    assert domains_of_ranks(tokens, 3) == [{"text"}, {"recall"}, {"copy", "sum"}]
    # text 40, then 20 each, then 13.3 each: it takes both further ranks
    names = [next(iter(one)) for one in domains_of_ranks(tokens, 6)]
    assert sorted(names) == ["copy", "recall", "sum", "text", "text", "text"]
    # text 40, then 20 each; recall, 30, is now where most is
    owners = domains_of_ranks({"text": 40, "recall": 30, "sum": 2}, 5)
    assert sorted(name for one in owners for name in one) == [
        "recall",
        "recall",
        "sum",
        "text",
        "text",
    ]


def test_with_domains_no_rank_has_twice_the_tokens_of_another():
    items = make_items(text=(50, 40), recall=(30, 6), copy=(30, 4), sum=(30, 3))
    assigned = assign_domains(items, 4, seed=0)
    job = composition(assigned, 4)
    assert job["rank_domains"] == [["text"], ["recall"], ["copy"], ["sum"]]
    tokens = job["rank_prompt_tokens"]
    assert min(tokens) == 90 and max(tokens) <= 180
    assert sorted(item.index for item in assigned) == list(range(len(assigned)))


def test_ranks_of_one_domain_get_different_items():
    items = [Item(domain="text", prompt=(number,)) for number in range(8)]
    items += [Item(domain="sum", prompt=(100 + number,), answer=(1,)) for number in range(4)]
    assigned = assign_domains(items, 3, seed=0)
    prompts = [item.prompt for item in assigned]
    assert len(set(prompts)) == len(prompts) == 12
    assert [len([i for i in assigned if i.rank == rank]) for rank in range(3)] == [4, 4, 4]


def test_the_cache_holds_every_request_of_the_fullest_rank_and_steps_the_batch():
    items = [
        Item(domain="text", prompt=(1,) * 33, index=0, rank=0),  # 3 blocks of 16
        Item(domain="a", prompt=(1,) * 15, answer=(1, 2), index=1, rank=1),  # 17 tokens: 2 blocks
        Item(domain="a", prompt=(1,) * 15, answer=(1,), index=2, rank=1),  # 1 block
    ]
    keys = engine_settings(2, items, batch_tokens=101)
    assert "scheduler.max_batch_tokens=51" in keys
    assert "scheduler.max_sequences=2" in keys
    assert "scheduler.kv_cache_blocks=5" in keys  # 3, and one spare for each of 2 sequences


# --- scores ------------------------------------------------------------------------------------


def test_loss_is_per_token_and_accuracy_per_task():
    found = scores(hits=(1, 0, 1, 1, 1), tasks=("a", "a", "b", "b", "b"))
    assert found.loss == pytest.approx(110 / 40) and found.perplexity == pytest.approx(exp(2.75))
    assert found.by_task == {"a": 0.5, "b": 1.0}
    assert found.accuracy == pytest.approx(0.75)
    assert found.accuracy_error == pytest.approx(sqrt(0.25 / 2) / 2)


def test_a_difference_that_all_examples_share_is_certain():
    gap = difference(scores(), scores(nll=(22.0, 96.0)))
    assert gap.loss == pytest.approx(-0.2) and gap.loss_error == pytest.approx(0.0)
    assert (gap.accuracy, gap.accuracy_error) == (0.0, 0.0)


def test_paired_errors_are_those_of_the_differences():
    # Losses differ by +1 and -1 over 10 tokens each: ratio 0, error sqrt(2/1 * 2) / 20 = 0.1.
    a, b = scores(nll=(11, 9), tokens=(10, 10)), scores(nll=(10, 10), tokens=(10, 10))
    gap = difference(a, b)
    assert gap.loss == 0.0 and gap.loss_error == pytest.approx(0.1)
    # Task a: differences 1 and 0, mean 0.5, variance 0.5 over 2 prompts; task b: none.
    gap = difference(scores(hits=(1, 1, 1, 1)), scores(hits=(0, 1, 1, 1)))
    assert gap.accuracy == pytest.approx(0.25)
    assert gap.accuracy_error == pytest.approx(sqrt(0.25) / 2)


def test_one_example_has_an_infinite_error():
    one = scores(nll=(1.0,), tokens=(1,), hits=(1,), tasks=("a",))
    gap = difference(one, one)
    assert gap.loss_error == gap.accuracy_error == inf


def test_an_answer_counts_only_whole_with_its_end_of_sequence():
    items = [
        Item(domain="text", prompt=(0, 1, 2), index=4),
        Item(domain="a", prompt=(0,), answer=(7, 1), index=2),
        Item(domain="a", prompt=(0,), answer=(7, 1), index=3),
    ]
    found = collect(items, {4: 1.5}, {2: [7, 1], 3: [7, 2]})
    assert found.tokens_X.tolist() == [2] and found.nll_X.tolist() == [1.5]
    assert found.hit_N.tolist() == [1.0, 0.0]
    with pytest.raises(KeyError):
        collect(items, {4: 1.5}, {2: [7, 1]})


def test_blending_interpolates_every_example():
    half = blend(scores(nll=(0, 0), hits=(0, 0, 0, 0)), scores(), 0.25)
    assert half.nll_X.tolist() == [5.0, 22.5] and half.hit_N.tolist() == [0.25, 0, 0.25, 0.25]


# --- results -----------------------------------------------------------------------------------


def test_a_result_adds_the_ranks_up():
    items = [
        Item(domain="text", prompt=(0, 1), index=0, rank=0),
        Item(domain="a", prompt=(0,), answer=(7,), index=1, rank=1),
    ]
    layers = [
        {"layer": 0, "assignments": 12, "dropped": 3, "added": 1, "orphans": 1},
        {"layer": 1, "assignments": 12, "dropped": 0, "added": 0, "orphans": 0},
    ]
    first = {
        "scored": [[0, 2.5]],
        "generated": [],
        "mass": [3.0, 2.0],
        # two steps of two layers; the first step runs 6 top-2 tokens, the second 3
        "before": [[[4, 2], [4, 2]]] * 2 + [[[2, 1], [3, 0]]] * 2,
        "after": [[3, 2], [4, 2], [2, 1], [2, 1]],
        "steps": [0, 0, 1, 1],
        "top_k": 2,
        "layers": layers,
        "seconds": 2.0,
        "bytes_sent": 9,
    }
    second = {
        "scored": [],
        "generated": [[1, [7]]],
        "mass": [1.0, 1.0],
        "after": [[4, 2], [3, 3], [3, 0], [3, 0]],
    }
    found = to_result(items, DROP, [first, second])
    assert found.scores.loss == 2.5 and found.scores.accuracy == 1.0
    assert (found.assignments, found.dropped, found.added, found.orphans) == (24, 3, 1, 1)
    assert found.drop_rate == 0.125 and found.gate_mass_kept == 0.75
    assert found.tokens == [6, 3]
    # slowest ranks before 8, 8, 5, 5; after 7, 7, 5, 5
    assert found.speed.bound == pytest.approx(26 / 24)
    assert orphan_share(found) == 1 * 2 / 24


def test_the_reference_check_wants_every_task_and_the_loss(tmp_path):
    mine = panel(result(DROPLESS))
    assert check_reference(mine, tmp_path) is None
    metrics = {"validation_loss": 2.7504, "task_accuracy": {"a": 0.5, "b": 1.0}}
    for change, matches in (({}, True), ({"validation_loss": 2.752}, False)):
        (tmp_path / "metrics.json").write_text(json.dumps(metrics | change))
        check = check_reference(mine, tmp_path)
        assert check is not None and check["matches"] is matches
    wrong = metrics | {"task_accuracy": {"a": 0.5, "b": 0.995}}
    (tmp_path / "metrics.json").write_text(json.dumps(wrong))
    check = check_reference(mine, tmp_path)
    assert check is not None and not check["matches"]


# --- timing ------------------------------------------------------------------------------------


def test_the_fullest_step_is_timed_in_proportion():
    calls = [call([40 * n, 20 * n, 8 * n, 12 * n], [10 * n] * 4) for n in (1, 1, 3, 3, 2, 2)]
    timed = replace(result(DROP), calls=calls, tokens=[40, 120, 80])
    step = fullest_step(timed)
    assert step == calls[2:4]
    (small, _) = scaled(step, 120)
    assert small.before_WE[0].tolist() == [60, 30, 12, 18]
    assert small.after_WE[0].tolist() == [15] * 4
    assert scaled(step, 10**6)[0].before_WE.tolist() == step[0].before_WE.tolist()
    with pytest.raises(ValueError, match="no rows are left"):
        scaled(step, 1)


def test_measured_speedup_sums_the_layers_before_it_divides(monkeypatch):
    class Layer:
        def __init__(self, shape, ranks):
            assert (shape.hidden, shape.ffn, shape.experts, shape.top_k, ranks) == (8, 4, 4, 2, 2)

        def compare(self, cases, rounds):
            return [SimpleNamespace(seconds=float(rank_rows(case).max())) for case in cases]

    monkeypatch.setattr(timing, "SimulatedLayer", Layer)
    shape = TimedShape(hidden=8, ffn=4, tokens=1000)
    calls = [call([20, 10, 4, 6], [14, 10, 4, 6]), call([5, 5, 5, 5], [5, 5, 5, 5])]
    capped = replace(result(DROP, bound=1.2), calls=calls, tokens=[20])
    beaten = replace(result(RANDOM, of=WORSE, bound=1.1), calls=calls, tokens=[20])
    timed = time_panel(panel(result(DROPLESS), capped, beaten), shape)
    # Only what is on a front, and dropless has no loads to compare.
    assert [item.measured for item in timed.results] == [None, pytest.approx(40 / 34), None]
    timed = time_panel(panel(result(DROPLESS), capped, beaten), shape, everything=True)
    assert timed.results[2].measured == pytest.approx(40 / 34)


# --- findings ----------------------------------------------------------------------------------


def finding_of(claim, *panels):
    (found,) = [item for item in findings(panels) if item.claim.startswith(claim)]
    return found


def test_a_claim_is_confirmed_only_by_pairs_beyond_noise():
    dropless = result(DROPLESS)
    good = panel(dropless, result(DROP), result(RANDOM, of=WORSE))
    bad = panel(dropless, result(DROP, of=WORSE), result(RANDOM))
    # one excerpt better, one worse: within noise
    noisy = scores(nll=(21.0, 88.0))
    open_ = panel(dropless, result(DROP), result(RANDOM, of=noisy))
    claim = "score keeps better tokens than random"
    assert finding_of(claim, good).verdict == "confirmed"
    assert finding_of(claim, good, open_).counts == {"better": 1, "worse": 0, "open": 1}
    assert finding_of(claim, bad).verdict == "contradicted"
    assert finding_of(claim, good, bad).verdict == "mixed"
    assert finding_of(claim, open_).verdict == "undecided"
    assert finding_of(claim, panel(dropless, result(DROP))).verdict == "not tested"


def test_equal_is_enough_for_a_claim_of_at_least():
    expanded = result(replace(DROP, policy="expanded_drop"))
    equal = panel(result(DROPLESS), result(DROP), expanded)
    claim = "expanded_drop is at least as good as token_drop"
    assert finding_of(claim, equal).verdict == "confirmed (equal)"


def test_pairs_differ_in_one_factor_alone():
    one_tier = replace(DROP, policy="expanded_drop", tiers="one")
    mine = panel(
        result(DROPLESS), result(DROP), result(one_tier), result(replace(DROP, factor="2"))
    )
    assert all(not found.pairs for found in findings([mine]) if "equal speed" not in found.claim)


def test_settings_that_drop_nothing_make_no_pair():
    idle = panel(
        result(DROPLESS, dropped=0), result(DROP, dropped=0), result(RANDOM, of=WORSE, dropped=0)
    )
    assert not finding_of("score keeps better", idle).pairs


def test_a_pair_whose_measures_disagree_is_open():
    better_loss = Difference(loss=-1.0, loss_error=0.1, accuracy=-0.5, accuracy_error=0.1)
    assert Pair("", "a", "b", better_loss).verdict == "open"
    assert Pair("", "a", "b", replace(better_loss, accuracy_error=1.0)).verdict == "better"
    assert Pair("", "a", "b", replace(better_loss, loss_error=1.0)).verdict == "worse"
    assert Pair("", "a", "b", replace(better_loss, loss_error=inf, accuracy=0.0)).verdict == "open"


def test_scopes_are_compared_at_equal_speed_bound():
    # At bound 1.5, half way between dropless and bound 2.0, the expert scope's curve has lost half
    # of 0.4 nats per token; the rank scope has lost nothing there.
    expert = result(DROP, of=scores(nll=(24.0, 102.0)), bound=2.0)
    rank = result(replace(DROP, scope="rank"), bound=1.5)
    beyond = result(replace(DROP, scope="rank", factor="0.5"), bound=2.5)
    found = finding_of("scope rank is better", panel(result(DROPLESS), expert, rank, beyond))
    (pair,) = found.pairs  # nothing to compare with beyond the curve
    assert pair.difference.loss == pytest.approx(-0.2)
    assert found.verdict == "confirmed"


def test_a_curve_is_read_between_its_points_only():
    points = [(2.0, scores(nll=(40.0, 180.0))), (1.0, scores())]
    at = at_speed(points, 1.25)
    assert at is not None and at.loss == pytest.approx(1.25 * 2.75)
    assert at_speed(points, 2.1) is None and at_speed(points, 0.9) is None


def test_a_finding_sums_up_its_pairs():
    gap = Difference(loss=-0.1, loss_error=0.01, accuracy=0.02, accuracy_error=0.1)
    found = Finding("A beats B", False, [Pair("here", "a", "b", gap)] * 2)
    sentence = found.sentence()
    assert "confirmed; of 2 pairs 2 better, 0 worse, 0 within" in sentence
    assert "loss -0.1000 nats, tasks +2.00 points" in sentence
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["pairs"][0]["verdict"] == "better" and record["verdict"] == "confirmed"


# --- output ------------------------------------------------------------------------------------

SHOWN = panel(
    result(DROPLESS, dropped=0),
    result(DROP, of=WORSE, bound=1.5),
    result(replace(RANDOM, policy="expanded_drop"), of=scores(nll=(30.0, 90.0)), bound=1.25),
)


def test_the_front_is_taken_for_both_measures():
    assert panel_fronts(SHOWN) == {"tasks": [1], "loss": [0, 1]}


def test_what_is_slower_than_dropless_is_on_no_front():
    perfect = scores(nll=(1.0, 1.0), hits=(1, 1, 1, 1))
    slower = panel(*SHOWN.results[:2], result(RANDOM, of=perfect, bound=0.9))
    assert panel_fronts(slower) == {"tasks": [1], "loss": [0, 1]}


def test_the_table_has_changes_against_dropless_and_a_column_for_measured_speedups():
    text = panel_text(SHOWN)
    (line,) = [line for line in text.splitlines() if line.startswith("token_drop 1 expert ")]
    assert {"+0.2000", "10.0%", "1.50"} <= set(line.split()) and line.split()[-1] == "TL"
    timed = replace(SHOWN, results=[*SHOWN.results[:2], replace(SHOWN.results[2], measured=1.19)])
    assert [line.split()[-1] for line in panel_text(timed).splitlines()[4:]] == ["-", "-", "1.19"]


def test_the_markdown_has_a_row_per_setting():
    lines = markdown([SHOWN]).splitlines()
    assert len(lines) == 2 + 3
    assert lines[3] == (
        "| tiny, 2 | token_drop | score | expert | global | 1 | 2.950 | 75.0 | 10.0% | 1.50 |  |"
    )


def test_a_record_is_json_even_where_one_example_leaves_no_error():
    one = scores(nll=(1.0,), tokens=(1,), hits=(1,), tasks=("a",))
    made = panel(result(DROPLESS, of=one), result(DROP, of=one))
    record = json.loads(json.dumps(panel_record(made, None), allow_nan=False))
    assert record["results"][1]["loss_change_error"] is None
    assert from_json(record["results"][1]["capacity"]) == DROP
    assert record["front"]["tasks"] == ["dropless"]


def test_the_figure_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    figure.draw([SHOWN, SHOWN], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
