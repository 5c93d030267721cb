"""Record a job, plan from the trace, run with the plan: as a user does, on two ranks.

Run: pytest tests/distributed/test_plan_chain.py
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plan_placement
import pytest

from engine.config import Config, ModelConfig, MoEConfig, ProfilerConfig, SchedulerConfig
from engine.llm import LLM
from engine.request import SamplingParams
from tests.helpers.ranks import run_ranks

CHECKPOINT = Path(__file__).parents[2] / "configs/checkpoints/tiny_mixtral"
TASKS = [f"copy: ball water wave town =>{' town' * n}" for n in range(16)]
CODE = [f"def read_file(self, path_{n}):\n    with open(path_{n}) as file:\n" for n in range(16)]


def run(rank: int, prompts: list[str], moe: dict[str, Any], routing: str | None) -> dict[str, Any]:
    llm = LLM(
        Config(
            model=ModelConfig(path=str(CHECKPOINT), dtype="float32", max_model_len=128),
            scheduler=SchedulerConfig(kv_cache_blocks=256, block_size=16),
            moe=MoEConfig(**moe),
            profiler=ProfilerConfig(routing=routing),
        )
    )
    done = llm.generate(prompts, SamplingParams(max_new_tokens=1))
    assert llm.report is not None
    report, plan = llm.report, llm.report.plan
    llm.close()
    return {
        "texts": [completion.text for completion in done],
        "plan": None if plan is None else asdict(plan),
        "costs": [{"expert_cost": asdict(each.expert_cost)} for each in report.ranks],  # pyright: ignore[reportArgumentType]
        "share": sum(load.mean for load in llm._telemetry.loads.layers.values())
        / sum(load.slowest_after for load in llm._telemetry.loads.layers.values()),
    }


def test_a_job_keeps_the_promise_of_a_plan_from_its_trace_and_other_traffic_does_not(
    tmp_path, capsys
):
    trace, plan = str(tmp_path / "routing"), str(tmp_path / "plan.yaml")
    before, _ = run_ranks(run, 2, CODE, {}, trace)
    assert before["plan"] is None, "no placement"
    budget = ["--ranks", "2", "--copies", "1", "--processes", "1"]
    assert plan_placement.main([f"code={trace}", *budget, "--out", plan]) == 0
    after, other = run_ranks(run, 2, CODE, {"placement": plan}, None)
    assert after["texts"] == before["texts"] and after["plan"] == other["plan"]
    assert after["plan"]["verdict"] == "kept" and after["plan"]["distance"] < 0.01
    assert after["plan"]["share"] == pytest.approx(after["share"]) and after["share"] > 0.95
    drifted, _ = run_ranks(run, 2, TASKS, {"placement": plan}, None)
    found = drifted["plan"]
    assert found["domain"] == "code" and found["distance"] > 0.2
    assert found["share"] == pytest.approx(drifted["share"])
    # What one rank reports of its experts' costs is what the tool reads.
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"run": {"ranks": before["costs"]}}))
    assert plan_placement.main([trace, *budget, "--speeds", str(report), "--out", plan]) == 0
    capsys.readouterr()
