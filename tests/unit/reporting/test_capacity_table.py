"""What a run prints about capacity. Run: pytest tests/unit/reporting/test_capacity_table.py"""

from __future__ import annotations

import dataclasses
import io
import json

from engine.config import CapacityConfig
from engine.moe.policy.policy import Expected, Policy
from engine.profiling.report import LayerReport, LayerTotals, RankReport, RunReport
from engine.reporting.capacity_table import describe, print_capacity
from engine.reporting.policy_report import policy_report
from engine.reporting.summary import Summary, make_console
from tests.helpers.texts import missing_from

TOKEN_DROP = CapacityConfig(policy="token_drop", factor="1.5")


def layer(number: int, dropped: int = 116, assignments: int = 1000, added: int = 0) -> LayerReport:
    return LayerReport(
        layer=number,
        rank_max_over_mean=1.87,
        rank_max_over_mean_after=1.24,
        expert_max_over_mean=2.5,
        expert_max_over_mean_after=1.5,
        expert_loads=[600, 400],
        expert_loads_after=[500, 384 + added],
        assignments=assignments,
        dropped=dropped,
        added=added,
        orphans=3,
        gate_mass_kept=0.935,
        drop_rate=dropped / assignments if assignments else 0.0,
    )


def run(layers: list[LayerReport], ranks: int = 2, imbalance: float = 1.87) -> RunReport:
    rank = RankReport(
        rank=0,
        host="a",
        tokens_prefill=1,
        tokens_decode=1,
        expert_rows=1,
        bytes_sent=0,
        num_collectives=0,
        preemptions=0,
        seconds={},
    )
    return RunReport(
        seconds=1.0,
        steps=1,
        ranks=[rank] * ranks,
        layers=layers,
        max_over_mean=imbalance,
        max_over_mean_after=1.24,
        speed_bound=1.51,
        totals=LayerTotals(
            added=sum(layer.added for layer in layers),
            orphans=sum(layer.orphans for layer in layers),
            gate_mass_kept=0.935,
            drop_rate=sum(layer.drop_rate for layer in layers) / len(layers),
        ),
    )


def printed(report: RunReport, capacity: CapacityConfig) -> str:
    out = io.StringIO()
    print_capacity(make_console(file=out), report, capacity)
    return out.getvalue()


def test_one_sentence_has_what_was_dropped_and_gained():
    assert describe(run([layer(0), layer(1, dropped=84)]), TOKEN_DROP) == (
        "token_drop at gamma 1.5 (expert scope, global consensus) dropped 10.0% of the 2,000 "
        "eligible assignments; over the run the most loaded rank processed 33.8% fewer rows "
        "(max/mean 1.87 -> 1.24): MoE layers at most 1.51x faster."
    )
    expanded = CapacityConfig(policy="expanded_drop", factor="1.5")
    assert "added 40 on" in describe(run([layer(0, added=40)]), expanded)


def test_extras_that_slow_the_layers_down_are_named_with_their_remedy():
    expanded = CapacityConfig(policy="expanded_drop", factor="2")
    slower = dataclasses.replace(run([layer(0, added=900)]), speed_bound=0.8)
    text = describe(slower, expanded)
    assert not missing_from(text, "1.25x SLOWER", "moe.capacity.extras=dropped")


def test_a_router_that_gives_combine_weights_alone_is_named_where_they_rank():
    report = dataclasses.replace(run([layer(0)]), ranked_by="combine weights")
    assert describe(report, TOKEN_DROP).endswith(
        "Assignments were ranked by combine weight: the router gives no other scores."
    )
    first = CapacityConfig(policy="token_drop", factor="1.5", order="first")
    by_score = dataclasses.replace(report, ranked_by="scores")
    assert "ranked by" not in describe(report, first) + describe(by_score, TOKEN_DROP)


def test_the_last_row_is_the_whole_run():
    text = printed(run([layer(number, added=2) for number in range(9)]), TOKEN_DROP)
    (row,) = [line.split() for line in text.splitlines() if "all 9" in line]
    assert row == ["all", "9", "1.87", "->", "1.24", "11.6%", "18", "27", "0.935"]


def test_the_table_has_every_layer_or_the_six_that_dropped_most():
    few = printed(run([layer(number) for number in range(8)]), TOKEN_DROP)
    assert all(f"layer {number}" in few for number in range(8))
    assert not missing_from(few, "1.87 -> 1.24", "11.6%", "0.935")
    many = printed(run([layer(number, dropped=10 * number) for number in range(9)]), TOKEN_DROP)
    assert [number for number in range(9) if f"layer {number}" in many] == [3, 4, 5, 6, 7, 8]
    assert "6 of 9 layers" in many.replace("\n", " ")


def test_phases_without_eligible_tokens_are_named():
    text = printed(run([layer(0, dropped=0, assignments=0)]), TOKEN_DROP)
    assert "phase prefill" in " ".join(text.split())
    assert "layer 0" not in text


def test_an_imbalanced_run_without_a_policy_is_advised_to_use_one():
    none = CapacityConfig()
    text = printed(run([layer(0)]), none)
    assert "--set moe.capacity.policy=token_drop" in text and "1.87x" in text
    # A factor above the imbalance drops next to nothing; only 1 can reach the bound it promises.
    assert "--set moe.capacity.factor=1," in " ".join(text.split())
    assert printed(run([layer(0)], imbalance=1.2), none) == ""
    assert printed(run([layer(0)], ranks=1), none) == "", "one rank waits for no other"


def policy_run(**expected: object) -> RunReport:
    policy = Policy(
        {0: TOKEN_DROP, 1: CapacityConfig(policy="token_drop", factor="1.05")},
        expected=Expected(**expected) if expected else None,  # pyright: ignore[reportArgumentType]
    )
    return dataclasses.replace(
        run([layer(0), layer(1)]), policy=policy_report(policy, "p.yaml", 0.948)
    )


def test_a_line_has_what_the_policy_promised_and_the_share_that_the_run_got():
    report = policy_run(share=0.951, loss=0.00071, bound=0.00098)
    assert report.policy is not None
    first = (
        f"The policy p.yaml (hash {report.policy.digest}) promised a share of perfect balance of "
        "0.951, 0.071% of loss added, at most 0.098% of loss added with 95% confidence; this run "
        "had a share of 0.948."
    )
    out = printed(report, TOKEN_DROP)
    assert first in out.splitlines()
    assert "token_drop by moe.policy (2 layers at gamma 1.05 to 1.5) dropped" in out
    kl = policy_run(bound=0.002, confidence=0.9, measure="kl")
    assert "at most 0.002 nats of KL divergence per token added with 90% con" in printed(
        kl, TOKEN_DROP
    )
    assert "promised nothing; this run" in printed(policy_run(), TOKEN_DROP)


def test_the_json_has_the_policy_where_there_is_one():
    def keys(report: RunReport) -> dict:
        summary = Summary(
            total=1,
            resumed=0,
            errors=0,
            requests=1,
            prompt_tokens=1,
            generated_tokens=1,
            run=report,
        )
        return json.loads(summary.to_json())["run"]

    assert "policy" not in keys(run([layer(0)]))
    found = keys(policy_run(share=0.9))["policy"]
    assert found["file"] == "p.yaml" and found["expected"]["share"] == 0.9
    assert found["layers"]["1"] == {
        "policy": "token_drop",
        "factor": "1.05",
        "scope": "expert",
        "order": "score",
        "consensus": "global",
        "phases": ["prefill"],
    }


def test_the_json_has_policy_and_layers():
    summary = Summary(
        total=1,
        resumed=0,
        errors=0,
        requests=1,
        prompt_tokens=1,
        generated_tokens=1,
        run=run([layer(4)]),
        capacity=TOKEN_DROP,
    )
    values = json.loads(summary.to_json())
    assert values["capacity"]["policy"] == "token_drop" and values["capacity"]["factor"] == "1.5"
    (entry,) = values["run"]["layers"]
    assert (entry["layer"], entry["dropped"], entry["drop_rate"]) == (4, 116, 0.116)
    assert (entry["rank_max_over_mean"], entry["rank_max_over_mean_after"]) == (1.87, 1.24)
    assert entry["orphans"] == 3 and values["run"]["speed_bound"] == 1.51
