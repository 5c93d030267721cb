"""profiler.routing on real ranks: the trace is what ran, with and without a capacity policy.

Run: pytest tests/distributed/test_routing_trace.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import (
    CapacityConfig,
    Config,
    ModelConfig,
    MoEConfig,
    OverlapConfig,
    ParallelConfig,
    ProfilerConfig,
    SchedulerConfig,
)
from engine.llm import LLM
from engine.profiling.decisions import LayerDecision
from engine.profiling.routing.claim_log import LayerClaims
from engine.profiling.routing.trace import (
    RoutingTrace,
    read_trace,
)
from engine.profiling.routing.trace_file import (
    CLAIMS,
    LOADS,
    trace_path,
)
from engine.reporting import open_exporters
from engine.reporting.summary import Summary, make_console, print_summary
from engine.request import SamplingParams
from tests.helpers.batch_case import command
from tests.helpers.batch_case import run as run_job
from tests.helpers.ranks import RanksFailed, run_ranks

CHECKPOINT = Path(__file__).parents[2] / "configs/checkpoints/tiny_mixtral"
PROMPTS = [list(range(5, 5 + length)) for length in (9, 21, 4, 13, 2)]
NEW = 6


def run(rank: int, folder: Path, settings: dict[str, Any], times: int = 1) -> dict[str, Any]:
    """Complete the prompts; return the steps' loads by layer, the decisions and the report."""
    if settings.get("all_claims", True):
        open_exporters.CLAIMS_EVERY = 1
    profiler = {"routing": str(folder), "routing_claims": True, "every": 4}
    llm = LLM(
        Config(
            model=ModelConfig(path=str(CHECKPOINT), dtype="float32", max_model_len=64),
            scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4, prefix_cache=False),
            moe=settings.get("moe", MoEConfig()),
            parallel=settings.get("parallel", ParallelConfig()),
            profiler=ProfilerConfig(**profiler | settings.get("profiler", {})),
        )
    )
    rows: list[dict[int, list[int]]] = []
    loads = llm._telemetry.loads
    record, reset_step = loads.record, loads.reset_step

    def keep(layer: int, *, before_E: np.ndarray, **others: Any) -> None:
        rows[-1][layer] = before_E.tolist()
        record(layer, before_E=before_E, **others)

    def end_step() -> float:
        rows.append({})
        return reset_step()

    patch = pytest.MonkeyPatch()
    patch.setattr(type(loads), "record", lambda self, *args, **named: keep(*args, **named))
    patch.setattr(type(loads), "reset_step", lambda self: end_step())
    rows.append({})
    decisions = llm.record_decisions()
    for _ in range(times):
        llm.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    patch.undo()
    assert llm.report is not None and llm.report.routing is not None
    assert llm._telemetry.claims.step is None
    console = make_console()
    counts = dict.fromkeys(
        ("total", "resumed", "errors", "requests", "prompt_tokens", "generated_tokens"), 0
    )
    summary = Summary(**counts, run=llm.report)
    with console.capture() as capture:
        print_summary(console, summary)
    llm.close()
    return {
        "rows": [step for step in rows if step],
        "decisions": decisions,
        "report": json.loads(summary.to_json())["run"],
        "printed": capture.get(),
    }


def check_claims(trace: RoutingTrace, num_ranks: int) -> None:
    """The experts that were chosen in each recorded step are its loads."""
    steps = list(trace.claims())
    assert len(steps) == len(trace.steps_S)
    for claims, loads_LE in zip(steps, trace.loads_SLE, strict=True):
        for layer, loads_E in zip(trace.layers, loads_LE, strict=True):
            found = claims.layers[layer]
            rows_E = np.bincount(found.topk_ids_TK.ravel(), minlength=trace.num_experts)
            assert rows_E.tolist() == loads_E.tolist()
            assert set(claims.ranks[layer].tolist()) <= set(range(num_ranks))
            assert np.isfinite(found.scores_TK).all() and (found.scores_TK > 0).all()


def choices(layer: int, found: LayerClaims | LayerDecision) -> dict[tuple[int, int, int], Any]:
    """(layer, request, position) -> the token's experts, and whether it is subject to capacity."""
    each = found.request_T, found.position_T, found.topk_ids_TK, found.eligible_T
    return {
        (layer, int(request), int(position)): (ids.tolist(), bool(eligible))
        for request, position, ids, eligible in zip(*each, strict=True)
    }


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(),
        MoEConfig(overlap=OverlapConfig(two_batch=True)),
        MoEConfig(capacity=CapacityConfig(policy="token_drop", factor="1")),
    ],
    ids=["dropless", "two micro-batches", "token_drop"],
)
def test_the_trace_has_the_loads_of_every_step_though_few_are_timed(tmp_path, moe):
    results = run_ranks(run, 2, tmp_path, {"moe": moe}, timeout=90)
    trace = read_trace(tmp_path)
    assert results[0]["rows"] == results[1]["rows"] != []
    assert [
        {layer: loads_LE[place].tolist() for place, layer in enumerate(trace.layers)}
        for loads_LE in trace.loads_SLE
    ] == results[0]["rows"]
    check_claims(trace, 2)
    assert trace.tokens_S2.sum(0).tolist() == [sum(map(len, PROMPTS)), len(PROMPTS) * (NEW - 1)]
    for result in results:
        report = result["report"]
        loads = [layer["expert_loads"] for layer in report["layers"]]
        assert trace.loads_SLE.sum(0).tolist() == loads
        # The text names it, and so does the file, under a key of its own.
        steps = len(trace.steps_S)
        assert report["routing"] == {
            "folder": str(tmp_path),
            "segment": 1,
            "steps": steps,
            "every": 1,
            "claims_steps": steps,
        }
        line = f"Routing of {steps} of {report['steps']} steps recorded in {tmp_path}, segment 1"
        assert line in result["printed"].replace("\n", "")


def test_claims_under_a_policy_name_the_tokens_of_its_decisions(tmp_path):
    moe = MoEConfig(capacity=CapacityConfig(policy="token_drop", factor="1"))
    results = run_ranks(run, 2, tmp_path, {"moe": moe}, timeout=90)
    decided = {}
    for result in results:
        for item in result["decisions"]:
            decided |= choices(item.layer, item)
    recorded = {}
    for claims in read_trace(tmp_path).claims():
        for layer, found in claims.layers.items():
            recorded |= choices(layer, found)
    assert decided and recorded.items() >= decided.items()


def test_runs_of_one_engine_and_of_a_later_one_are_segments_of_one_trace(tmp_path):
    run_ranks(run, 2, tmp_path, {}, 2, timeout=90)
    before = trace_path(tmp_path, LOADS, 0).read_bytes()
    # Elastic: on another number of ranks, without the profiler's stamps.
    off = {"profiler": {"enabled": False}}
    run_ranks(run, 1, tmp_path, off, timeout=90)
    assert trace_path(tmp_path, LOADS, 0).read_bytes().startswith(before)
    trace = read_trace(tmp_path)
    check_claims(trace, 2)
    sums = [trace.loads_SLE[trace.segments_S == segment].sum(0) for segment in (1, 2, 3)]
    assert (sums[0] == sums[1]).all()
    assert [set(trace.ranks_S[trace.segments_S == n].tolist()) for n in (1, 2, 3)] == [
        {2},
        {2},
        {1},
    ]


def test_each_replica_has_a_file_and_the_report_its_own_steps(tmp_path):
    results = run_ranks(run, 2, tmp_path, {"parallel": ParallelConfig(expert=1)}, timeout=90)
    trace = read_trace(tmp_path)
    check_claims(trace, 2)
    for rank, result in enumerate(results):
        mine = trace.first_ranks_S == rank
        assert result["report"]["routing"]["steps"] == mine.sum() == len(result["rows"])
    loads = trace.loads_SLE.sum((1, 2))
    assert (loads > 0).all()


def test_a_full_recording_covers_the_whole_run_on_every_rank(tmp_path):
    small = {"profiler": {"routing_mib": 0.02}, "all_claims": False}
    results = run_ranks(run, 2, tmp_path, small, 3, timeout=90)
    trace = read_trace(tmp_path)
    steps = [(claims.segment, claims.step) for claims in trace.claims()]
    assert [step for step in steps if step[0] == 1][0] == (1, 1) and steps[-1][0] == 3
    for path in tmp_path.iterdir():
        assert path.stat().st_size <= 0.01 * 2**20
    kept = results[0]["report"]["routing"]
    assert kept["claims_steps"] < kept["steps"] <= results[0]["report"]["steps"]


def test_a_folder_of_another_model_is_refused_before_the_model_is_loaded(job, tmp_path):
    run_ranks(run, 1, tmp_path, {}, timeout=60)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    output = tmp_path / "out.jsonl"
    argv = command(job, output, "--set", f"profiler.routing={tmp_path}")
    for code, _, err in run_job(2, argv):
        assert code == 2 and "Traceback" not in err
    ((code, _, err),) = run_job(1, argv)
    assert code == 2 and "has the routing of another model" in err, err
    assert str(CHECKPOINT) in err and "a folder of its own for every model" in err
    assert {path: path.read_bytes() for path in before} == before
    small = ["--set", f"profiler.routing={tmp_path / 'new'}", "--set", "profiler.routing_mib=1e-4"]
    ((code, _, err),) = run_job(1, command(job, output, *small))
    assert code == 2 and "profiler.routing_mib = 0.0001: is too small for one step" in err, err


def test_a_job_that_was_killed_leaves_a_trace_that_it_continues(job, tmp_path):
    folder, output = tmp_path / "r", tmp_path / "out.jsonl"
    argv = command(job, output, "--set", f"profiler.routing={folder}")
    with pytest.raises(RanksFailed):
        run_job(1, argv, (0, 4, "kill after"))
    first = read_trace(folder)
    assert set(first.segments_S.tolist()) == {1} and not list(first.claims())
    ((code, _, err),) = run_job(1, argv)
    assert code == 0, err
    trace = read_trace(folder)
    assert set(trace.segments_S.tolist()) == {1, 2}
    assert trace.loads_SLE[: len(first.steps_S)].tolist() == first.loads_SLE.tolist()
    report = json.loads(Path(f"{output}.report.json").read_text())["run"]
    assert report["routing"]["segment"] == 2
    assert report["routing"]["claims_steps"] is None
    assert not trace_path(folder, CLAIMS, 0).exists()
