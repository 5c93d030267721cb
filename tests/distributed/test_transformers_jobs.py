"""Jobs of models that transformers builds: batch job, kills, report, spans, on two real ranks.

Run: pytest tests/distributed/test_transformers_jobs.py
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine.config import Config, ModelConfig, RuntimeConfig
from engine.llm import LLM
from engine.request import SamplingParams
from tests.helpers.batch_case import ALL, command, committed, make_batch_job, records, report, run
from tests.helpers.ranks import RanksFailed, run_ranks
from tests.helpers.transformers_cases import FOREIGN_CASES

ASKED = ("--set", "model.implementation=transformers")
LAYER_PHASES = ("attention", "gate", "plan", "dispatch", "experts", "combine", "other")
LATE_S, STEPS = 0.03, 20


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of a GraniteMoE, a family that is not ours."""
    path = tmp_path_factory.mktemp("job")
    make_batch_job(path)
    torch.manual_seed(0)
    settings = FOREIGN_CASES["granitemoe"].settings
    vocab = json.loads((path / "model/config.json").read_text())["vocab_size"]
    config = transformers.GraniteMoeConfig(
        **{**settings, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        num_key_value_heads=2,
        vocab_size=vocab,
        max_position_embeddings=96,
        initializer_range=0.3,
    )
    transformers.GraniteMoeForCausalLM(config).save_pretrained(path / "model")
    return path


@pytest.fixture(scope="module")
def undisturbed(job: Path) -> list[dict[str, Any]]:
    output = job / "undisturbed.jsonl"
    ((code, _, err),) = run(1, command(job, output, *ASKED))
    assert code == 0, err
    return records(output)


@pytest.mark.long
@pytest.mark.parametrize(
    ("event", "ranks", "again"),
    [("kill before", 2, 1), ("kill inside", 1, 2), ("kill after", 2, 3)],
)
def test_a_killed_job_resumes_on_other_ranks_with_nothing_lost_or_doubled(
    job: Path, undisturbed: Any, tmp_path: Path, event: str, ranks: int, again: int
) -> None:
    output, victim = tmp_path / "out.jsonl", ranks - 1
    argv = command(job, output, *ASKED)
    with pytest.raises(RanksFailed, match=f"rank {victim}: exited without a result, exit code -9"):
        run(ranks, argv, (victim, 3, event))
    done = committed(output, ranks)
    assert 0 < len(done) < ALL and not output.exists()
    for code, _, err in run(again, argv):
        assert code == 0, err
    same(records(output), undisturbed)
    values = report(output)
    assert (values["resumed"], values["requests"]) == (len(done), ALL - len(done))


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Compare records; which requests share a step decides how scores are rounded."""
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            if name.endswith("logprobs"):
                assert mine[name] == [each and pytest.approx(each, abs=1e-5) for each in value]
            elif name == "capacity":
                assert mine[name] == pytest.approx(value, abs=1e-5)
            else:
                assert mine[name] == value


@pytest.mark.long
def test_the_report_and_the_spans_have_every_ranks_time_by_phase_and_every_layers_loads(
    job: Path, tmp_path: Path
) -> None:
    output, folder = tmp_path / "out.jsonl", tmp_path / "spans"
    for code, _, err in run(2, command(job, output, *ASKED, "--set", f"profiler.spans={folder}")):
        assert code == 0, err
    values = report(output)["run"]
    tokens = sum(rank["tokens_prefill"] + rank["tokens_decode"] for rank in values["ranks"])
    for rank in values["ranks"]:
        assert all(rank["seconds"][name] > 0 for name in ("attention", "experts", "communication"))
        assert all(rank["phases"][name]["seconds"] > 0 for name in LAYER_PHASES)
        own = rank["tokens_prefill"] + rank["tokens_decode"]
        assert rank["phases"]["attention"]["tokens"] == 2 * own, "two layers"
        assert rank["phases"]["gate"]["tokens"] == 2 * own
        assert rank["phases"]["experts"]["tokens"] == rank["expert_rows"] > 0
    for layer in values["layers"]:
        assert len(layer["expert_loads"]) == 5
        assert sum(layer["expert_loads"]) == 2 * tokens, "top-2"
        assert all(layer["seconds"][name] > 0 for name in LAYER_PHASES)
    for rank in range(2):
        head, *steps = map(json.loads, (folder / f"spans.rank{rank:05}.jsonl").open())
        assert (head["rank"], head["num_layers"], head["num_experts"]) == (rank, 2, 5)
        assert head["own_experts"] == dict.fromkeys("01", [[0, 1, 2], [3, 4]][rank])
        found = {(span[0], span[1]) for step in steps for span in step["spans"]}
        wanted = [head["phases"].index(name) for name in LAYER_PHASES]
        assert found >= {(phase, layer) for phase in wanted for layer in range(2)}


def late(rank: int, path: Path) -> Any:
    """One prompt per rank; rank 1 sleeps in the attention of the second layer."""
    model = ModelConfig(path=str(path), implementation="transformers", max_model_len=64)
    llm = LLM(Config(model=model, runtime=RuntimeConfig(device="cpu", timeout_s=30.0, threads=1)))
    if rank == 1:
        attention = llm.model.body.layers[1].self_attn
        attention.register_forward_pre_hook(lambda *_: time.sleep(LATE_S))
    params = SamplingParams(max_new_tokens=STEPS, ignore_eos=True)
    llm.generate([[5, 6, 7], [8, 9, 10]], params)
    report = llm.report
    llm.close()
    return report


@pytest.mark.alone
def test_a_rank_that_is_late_in_one_layer_is_named_with_what_the_others_waited(job: Path) -> None:
    values = run_ranks(late, 2, job / "model", timeout=60)[0]
    # A mean rank of two waited half of what rank 0 did.
    slept, costs = STEPS * LATE_S, [sum(each.wait_caused.values()) for each in values.ranks]
    assert costs[1] > slept / 4 and costs[0] < costs[1] / 2, costs
    assert [each.ranks for each in values.findings][:1] == [[1]], values.findings
    assert values.findings[0].cause == "device" and values.layers[1].wait > values.layers[0].wait
