"""What a job prints at its end."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from engine.config import CapacityConfig
from engine.profiling.cost_model import ExpertCost
from engine.profiling.deepspeed_comms import CommsRow
from engine.profiling.findings import Finding
from engine.profiling.report import (
    LayerReport,
    LayerTotals,
    PhaseReport,
    PlanLayerReport,
    PlanReport,
    RankReport,
    RoutingReport,
    RunReport,
)
from engine.reporting.summary import Summary, percentiles, print_summary


def rank(
    number: int, *, attention=1.0, experts=1.0, waiting=0.0, rows=100, host="node"
) -> RankReport:
    return RankReport(
        rank=number,
        host=host,
        tokens_prefill=10,
        tokens_decode=20,
        expert_rows=rows,
        bytes_sent=0,
        num_collectives=0,
        preemptions=0,
        seconds={
            "attention": attention,
            "experts": experts,
            "communication": 0.5,
            "waiting": waiting,
            "other": 0.1,
        },
    )


def run_report(*ranks: RankReport, **changes) -> RunReport:
    values = {
        "seconds": 2.0,
        "steps": 7,
        "ranks": list(ranks),
        "layers": [],
        "max_over_mean": 1.5,
        "latencies": {"ttft": [0.1, 0.2, 0.3], "tpot": [0.01]},
    }
    return RunReport(**(values | changes))


def summary(run: RunReport | None, **changes) -> Summary:
    values = {
        "total": 5,
        "resumed": 2,
        "errors": 1,
        "requests": 3,
        "prompt_tokens": 30,
        "generated_tokens": 40,
    }
    return Summary(run=run, **(values | changes))


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=120, **options)


def printed(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_percentiles_by_hand():
    assert percentiles(run_report(latencies={"ttft": [1.0, 2.0, 3.0], "tpot": []})) == {
        "ttft": {"p50": 2.0, "p99": 2.98}
    }


def test_the_findings_and_the_stragglers_are_shown_with_the_wait_they_caused():
    slow = replace(
        rank(3),
        straggler_share=0.78,
        relative_compute_time=1.31,
        wait_caused={"load": 0.25, "device": 1.5, "host": 0.0},
    )
    found = [Finding("rank 3 computes 31% slower", "device", [3], 0.4)]
    out = console()
    print_summary(out, summary(run_report(rank(0), slow, findings=found)))
    text = printed(out)
    assert found[0].text in text
    row = next(line for line in text.splitlines() if line.startswith(" 3 ") and "78%" in line)
    assert row.split() == ["3", "78%", "+31%", "0.25", "0.00", "1.50", "0.00"]


def test_where_no_rank_was_a_straggler_there_is_no_table_of_them():
    out = console()
    found = [Finding("balanced", "balanced", [], 0.01)]
    print_summary(out, summary(run_report(rank(0), rank(1), findings=found)))
    assert "Waited-for rank" not in printed(out) and "Straggler: balanced." in printed(out)


def test_of_many_ranks_the_eight_that_caused_the_longest_waits_are_shown():
    ranks = [
        replace(rank(n), straggler_share=0.1, wait_caused={"host": float(n)}) for n in range(10)
    ]
    out = console()
    print_summary(out, summary(run_report(*ranks)))
    table = printed(out)[printed(out).index("Waited-for rank") :]
    shown = [line.split()[0] for line in table.splitlines() if "10%" in line]
    assert shown == [str(n) for n in range(2, 10)] and "2 ranks caused less" in table


def test_the_summary_shows_throughput_latency_and_every_rank():
    out = console()
    print_summary(out, summary(run_report(rank(0), rank(1, experts=9.0, host="far"))))
    text = printed(out)
    for part in ("15.0", "20.0", "200.0 ms", "298.0 ms", "10.0 ms", "far", "9.00"):
        assert part in text, f"{part} is missing in\n{text}"
    (line,) = [line for line in text.splitlines() if " requests, " in line]
    assert re.findall(r"\d+", line) == ["5", "2", "1"] and "error" in line


def test_a_run_with_nothing_left_to_do_still_prints_the_job_s_totals():
    out = console()
    print_summary(out, summary(None, resumed=5, errors=0))
    assert printed(out) == "5 requests, 5 of them by earlier runs.\n"


def test_the_json_has_the_run_s_totals_and_the_settings_they_were_made_under():
    totals = LayerTotals(
        assignments=200,
        dropped=30,
        added=5,
        orphans=2,
        gate_mass_kept=0.9,
        drop_rate=0.15,
        bytes_sent=4096,
        collectives_per_call=3.0,
    )
    capacity = CapacityConfig(policy="expanded_drop", factor="1.25", phases=("prefill", "decode"))
    values = json.loads(summary(run_report(totals=totals), capacity=capacity).to_json())
    assert values["run"]["totals"] == {
        "assignments": 200,
        "dropped": 30,
        "added": 5,
        "orphans": 2,
        "gate_mass_kept": 0.9,
        "drop_rate": 0.15,
        "bytes_sent": 4096,
        "collectives_per_call": 3.0,
    }
    names = ("policy", "factor", "scope", "consensus", "order", "phases")
    assert {name: values["capacity"][name] for name in names} == {
        "policy": "expanded_drop",
        "factor": "1.25",
        "scope": "expert",
        "consensus": "global",
        "order": "score",
        "phases": ["prefill", "decode"],
    }


def test_the_summary_as_json_has_percentiles_in_place_of_latencies():
    values = json.loads(summary(run_report(rank(0))).to_json())
    assert values["total"] == 5 and values["run"]["steps"] == 7
    assert values["run"]["latencies"]["tpot"] == {"p50": 0.01, "p99": 0.01}
    assert values["run"]["ranks"][0]["seconds"]["attention"] == 1.0
    assert "run" not in json.loads(summary(None).to_json())


def test_requests_that_were_run_again_are_counted_where_there_are_any():
    out = console()
    retried = summary(None, retried=2)
    print_summary(out, retried)
    assert "2 of them by earlier runs, 2 run again after an error, 1 with" in printed(out)
    assert json.loads(retried.to_json())["retried"] == 2
    assert "retried" not in json.loads(summary(None).to_json())


def test_shared_prefixes_are_named_and_in_the_file_where_lines_were_dealt_by_them():
    out = console()
    shared = {"lines": 1200, "prefixes": 1, "prompt_share": 0.4567}
    dealt = summary(None, shared_prefixes=shared)
    print_summary(out, dealt)
    assert "1,200 lines share 1 prefix, 46% of all prompts" in printed(out)
    assert json.loads(dealt.to_json())["shared_prefixes"] == shared
    assert "shared_prefixes" not in json.loads(summary(None).to_json())


def test_shared_rows_that_moved_are_in_the_file_only_where_they_may_move():
    layer = LayerReport(0, 1.5, 1.2, 2.0, 1.5, [3, 1], [2, 1])
    layers = [layer, replace(layer, shared_rows_moved=0)]
    values = json.loads(summary(run_report(rank(0), layers=layers)).to_json())
    first, second = values["run"]["layers"]
    assert second.pop("shared_rows_moved") == 0
    assert first == second


def test_a_recording_of_the_routing_is_named_where_there_is_one():
    out = console()
    routing = RoutingReport("/r", 2, 1024, 4, None)
    recorded = summary(replace(run_report(rank(0)), steps=4096, routing=routing))
    print_summary(out, recorded)
    assert "Routing of 1,024 of 4,096 steps recorded in /r, segment 2." in printed(out)
    found = json.loads(recorded.to_json())["run"]["routing"]
    assert found == {"folder": "/r", "segment": 2, "steps": 1024, "every": 4, "claims_steps": None}


def test_the_keys_of_the_report_file_are_those_that_its_readers_know():
    first = replace(
        rank(0),
        phases={"gate": PhaseReport(1.0, 0.5, 3, 4)},
        comms={"all_reduce (tensor)": [CommsRow(1024, 1, 9, 0.5, 0.5, 1.0, 1.0)]},
    )
    layers = [LayerReport(0, 1.5, 1.2, 2.0, 1.5, [3, 1], [2, 1])]
    found = [Finding("rank 3 computes 31% slower", "device", [3], 0.4)]
    values = json.loads(summary(run_report(first, layers=layers, findings=found)).to_json())
    run = values["run"]
    assert list(values) == (
        "total resumed errors requests prompt_tokens generated_tokens cached_tokens user_keys "
        "capacity run".split()
    )
    assert list(run) == (
        "seconds steps ranks layers max_over_mean max_over_mean_after speed_bound totals latencies "
        "verdict lost clock_error capacity_shares".split()
    )
    assert list(run["ranks"][0]) == (
        "rank host tokens_prefill tokens_decode expert_rows bytes_sent num_collectives preemptions "
        "seconds phases slowness late_share lost comms resolved absent".split()
    )
    assert list(run["ranks"][0]["phases"]["gate"]) == "seconds waiting tokens bytes_sent".split()
    assert (
        list(run["ranks"][0]["comms"]["all_reduce (tensor)"][0])
        == (
            "message_bytes count bytes total_latency_ms avg_latency_ms tput_avg_gbps busbw_avg_gbps"
        ).split()
    )
    assert list(run["layers"][0]) == (
        "layer rank_max_over_mean rank_max_over_mean_after expert_max_over_mean "
        "expert_max_over_mean_after expert_loads expert_loads_after assignments dropped added "
        "orphans gate_mass_kept drop_rate bytes_sent num_collectives seconds lost "
        "lost_by_cause".split()
    )
    assert list(run["totals"]) == (
        "assignments dropped added orphans gate_mass_kept drop_rate bytes_sent "
        "collectives_per_call".split()
    )
    assert list(run["verdict"][0]) == "text cause ranks share layer".split()


def test_deepspeeds_table_is_rank_0s_with_sizes_in_their_units_and_only_where_asked_for():
    rows = [CommsRow(0, 2, 0, 0.5, 0.25, 0.0, 0.0), CommsRow(2 << 20, 1234, 9, 5e3, 4.0519, 1.5, 1)]
    comms = {"all_to_all_single (dispatch)": rows}
    out = console()
    print_summary(out, summary(run_report(replace(rank(0), comms=comms), rank(1))))
    text = printed(out)
    assert "0 B" in text and "2 MiB" in text and "1,234" in text and "4.052" in text
    assert text.count("all_to_all_single (dispatch)") == 1
    out = console()
    print_summary(out, summary(run_report(rank(0), rank(1))))
    assert "DeepSpeed" not in printed(out)


def test_the_plan_is_printed_and_written_where_there_is_one():
    plan = PlanReport(
        file="plan.yaml",
        domain="text",
        distance=0.25,
        distances={"text": 0.25},
        promised=0.98,
        share=0.8,
        expected=0.97,
        predicted=0.8,
        verdict="plan again",
        layers=[PlanLayerReport(3, 0.98, 0.8, 0.25)],
        text=["Placement plan.yaml: share 0.80", "Plan again: [loads] have drifted"],
    )
    first = replace(rank(0), expert_cost=ExpertCost([2], [64.0], [0.001]), state_bytes=4096)
    job = summary(run_report(first, rank(1), plan=plan))
    out = console()
    print_summary(out, job)
    assert all(line in printed(out).splitlines() for line in plan.text)
    run = json.loads(job.to_json())["run"]
    assert (
        list(run["plan"])
        == (
            "file domain distance distances promised share expected predicted verdict layers text"
        ).split()
    )
    assert run["plan"]["layers"] == [{"layer": 3, "promised": 0.98, "share": 0.8, "distance": 0.25}]
    assert run["ranks"][0]["expert_cost"] == {"calls": [2], "rows": [64.0], "seconds": [0.001]}
    assert run["ranks"][0]["state_bytes"] == 4096
    assert not {"expert_cost", "state_bytes"} & set(run["ranks"][1])


def test_the_file_with_the_error_records_is_named_where_it_is_another():
    out = console()
    print_summary(out, summary(None, error_file=Path("out.errors.jsonl")))
    assert "1 with an error record in out.errors.jsonl." in printed(out)
    assert "error_file" not in summary(None, error_file=Path("x")).to_json()
