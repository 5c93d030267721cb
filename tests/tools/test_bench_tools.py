"""The benches' own parts: jobs, workers, interleaving, tables, the MoE case, random checkpoints.

python -m pytest tests/tools/test_bench_tools.py
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from pathlib import Path
from typing import Any

import bench_generate
import pytest
import torch
from bench.candidate import REPOSITORY, Candidate, WorkerError, select, start
from bench.environment_record import environment_record
from bench.generation import REFERENCE, generation_candidates
from bench.generation_tables import rank_table
from bench.hot_rank import heat_first_rank
from bench.interleave import interleave
from bench.jobs import JOBS, make_job
from bench.moe_case import (
    MoEShape,
    make_ids,
    make_tokens,
    make_weights,
    reference,
    share,
)
from bench.report import cell, emit, table
from make_random_checkpoint import FAMILIES, SIZES, hugging_face_fields, make_checkpoint
from safetensors.torch import load_file, save_file

SMALL = MoEShape(hidden=32, ffn=16, experts=6, top_k=3)


def test_ragged_job_is_the_published_one() -> None:
    job = make_job("ragged", vocab_size=4096)
    lengths = [len(prompt) for prompt in job.prompts]
    assert (len(lengths), sum(lengths), job.new_tokens) == (64, 12964, 64)
    assert min(lengths) >= 16 and max(lengths) <= 384


def test_the_job_with_shared_prefixes_has_four_in_no_order() -> None:
    job = make_job("shared_prefix", vocab_size=4096)
    prefixes = [prompt[:256] for prompt in job.prompts]
    assert (len(prefixes), len(set(prefixes)), job.new_tokens) == (512, 4, 32)
    assert prefixes != sorted(prefixes)
    own = [prompt[256:] for prompt in job.prompts]
    assert len(set(own)) == 512
    assert {16, 64} <= set(map(len, own)) <= set(range(16, 65))


def test_a_job_is_the_same_each_time_and_within_the_vocabulary() -> None:
    for name in JOBS:
        job = make_job(name, vocab_size=50)
        assert job == make_job(name, vocab_size=50)
        assert {token for prompt in job.prompts for token in prompt} <= set(range(50))


def test_interleaving_alternates_between_candidates() -> None:
    order: list[str] = []

    def measure(key: str) -> int:
        order.append(key)
        return len(order)

    values = interleave(["a", "b", "c"], 2, measure, pause_s=0)
    assert order == ["a", "b", "c", "a", "b", "c"]
    assert values == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}


def test_table_aligns_names_left_and_numbers_right() -> None:
    text = table(["name", "n"], [["a", 5], ["longer", 12345], ["none", None]])
    assert text.splitlines()[2:] == ["a            5", "longer  12,345", "none         -"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1,234"), (3.14159, "3.14"), (2e-6, "2.0e-06"), (True, "True"), ("x", "x")],
)
def test_cells_are_short(value: object, text: str) -> None:
    assert cell(value) == text


def test_emit_prints_a_table_then_one_json_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    emit("a table", {"bench": "x"}, tmp_path, "x")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a table" and json.loads(lines[-1]) == {"bench": "x"}
    assert json.loads((tmp_path / "x.json").read_text()) == {"bench": "x"}


def test_the_environment_record_names_commit_hardware_and_versions() -> None:
    found = environment_record(("torch", "no-such-package"))
    assert found["commit"] and found["hardware"]["cores"] >= 1
    assert found["packages"] == {"torch": torch.__version__, "no-such-package": None}


ECHO = """
import os, sys
from bench.protocol import memory_mib, serve

class Worker:
    def echo(self, text): return {"text": text, "engine": any(
        os.path.isdir(os.path.join(p, "engine")) for p in sys.path), **memory_mib()}
    def fail(self): raise ValueError("no luck")
    def die(self): print("cause of death", flush=True); os._exit(3)

serve(Worker())
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Candidate:
    (tmp_path / "echo_worker.py").write_text(textwrap.dedent(ECHO))
    (tmp_path / "broken_worker.py").write_text("raise SystemExit('cannot begin')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # `python -m` puts the working directory on the module path
    return Candidate(name="echo", module="echo_worker", python=sys.executable)


def test_a_worker_answers_and_reports_its_memory(echo: Candidate) -> None:
    with start(echo, timeout_s=60) as running:
        (reply,) = running.call("echo", text="grüße")
        assert reply["text"] == "grüße" and reply["peak_rss_mib"] >= reply["rss_mib"] > 1
        assert not reply["engine"], "a peer must not see the repository on its module path"


def test_a_failing_request_leaves_the_worker_alive(echo: Candidate) -> None:
    with start(echo, timeout_s=60) as running:
        with pytest.raises(WorkerError, match="echo: 'fail' failed(.|\n)*no luck"):
            running.call("fail")
        assert running.call("echo", text="still here")[0]["text"] == "still here"


def test_a_dead_worker_is_reported_with_the_end_of_its_log(echo: Candidate) -> None:
    with start(echo, timeout_s=60) as running:
        with pytest.raises(WorkerError, match="died in 'die'(.|\n)*cause of death"):
            running.call("die")


def test_a_worker_that_cannot_start_is_reported_with_its_log(echo: Candidate) -> None:
    broken = Candidate(name="broken", module="broken_worker", python=echo.python)
    with pytest.raises(WorkerError, match="broken: the worker did not start(.|\n)*cannot begin"):
        with start(broken, timeout_s=60):
            pass


def test_several_ranks_start_through_torchrun_and_only_the_engine_sees_the_repository(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)  # every candidate inherits it
    found = {c.name: c for c in generation_candidates({}, 2, ["a.b=c"], None)}
    two = found["lockstep-2-ranks"]
    assert "torch.distributed.run" in two.command("s") and two.threads == 1
    assert "scheduler.kv_cache_gib=0.5" in two.load["settings"]
    assert "a.b=c" in two.load["settings"]
    paths = {name: c.environment()["PYTHONPATH"].split(":") for name, c in found.items()}
    assert str(REPOSITORY) in paths["lockstep-1-rank"]
    assert str(REPOSITORY) not in paths[REFERENCE]
    assert str(REPOSITORY) not in paths["transformers-2-ranks-all_to_all"]
    assert str(REPOSITORY) in paths["transformers-2-ranks-lockstep"]
    assert str(REPOSITORY) in paths["transformers-2-ranks-lockstep-token_drop"]
    assert found["lockstep-2-ranks-by-transformers"].load["settings"][-2:] == [
        "a.b=c",
        "model.implementation=transformers",
    ]


def test_every_candidate_gets_all_cores_and_vllm_needs_an_interpreter() -> None:
    assert "vllm" not in {c.name for c in generation_candidates({}, 2, [], None)}
    found = generation_candidates({"vllm": sys.executable}, 2, [], None)
    assert {c.ranks * c.threads for c in found} == {2}


def test_an_absent_candidate_is_refused_by_name_and_the_former_option_works() -> None:
    with pytest.raises(ValueError, match="vllm cannot run here.*lockstep-1-rank"):
        select(generation_candidates({}, 2, [], None), ["vllm"])
    for option in ("--candidates", "--contenders"):
        assert bench_generate._parse([option, "a,b"]).candidates == ["a", "b"]


def test_rates_follow_their_definitions() -> None:
    job = make_job("batch8", 100)  # 8 prompts of 128 tokens, 32 new each
    figures = bench_generate._figures(job, [0.5, 0.4, 9.0], [2.5, 3.0, 1.0], [{"peak_rss_mib": 7}])
    assert figures["prefill_tok_s"] == pytest.approx(8 * 128 / 0.5)
    assert figures["decode_tok_s"] == pytest.approx(8 * 31 / 2.0)
    assert figures["generated_tok_s"] == pytest.approx(8 * 32 / 2.5)
    assert figures["peak_mib"] == [7]
    assert bench_generate._figures(job, [2.0], [1.0], [])["decode_tok_s"] is None


def parts(computing: float, moving: float, waiting: float) -> dict[str, float]:
    return {"computing": computing, "moving": moving, "waiting": waiting}


def test_ranks_are_compared_with_one_rank_and_with_free_exchanges() -> None:
    figures = {
        "alone": {"rank_seconds": [parts(9.0, 1.0, 0.0)]},
        "peer": {},
        "both": {
            "rank_seconds": [parts(7.0, 2.0, 3.5), parts(9.0, 2.0, 1.0)],
            "meeting": {"every_ms": 4.0, "share": {"median": 0.6}},
        },
        "unmeasured": {"rank_seconds": [parts(0.0, 0.0, 0.0)] * 2},
    }
    text = rank_table(figures)
    assert text.splitlines()[-2:] == [
        "both: 0.8 times as fast as one rank; at best, without communication and waiting, 1.25",
        "  with a barrier after every 4 ms of equal work, which leaves cores 0.6 of their speed "
        "here, 0.75",
    ]
    assert "peer" not in text and text.count("times as fast") == 1
    del figures["alone"]
    assert "both" in rank_table(figures)
    assert "times as fast" not in rank_table(figures)
    assert rank_table({"peer": {}}) == ""


def test_only_measured_rounds_of_the_whole_job_make_a_ranks_seconds() -> None:
    asked: list[int] = []

    class Worker:
        def call(self, name: str, prompts: list, new_tokens: int) -> list[dict]:
            asked.append(new_tokens)
            computing = {1: 100.0, 32: float(len(asked))}[new_tokens]
            rank = {"seconds": 1.0, "tokens": [[1]] * len(prompts), "peak_rss_mib": 1}
            return [rank | {"parts": parts(computing, 0.0, 0.5)}]

    running: Any = {"one": Worker()}
    figures, _ = bench_generate.measure(running, make_job("batch8", 100), rounds=2, pause_s=0.0)
    measured = [place for place, new in enumerate(asked, 1) if new == 32][1:]
    assert figures["one"]["rank_seconds"] == [parts(sum(measured) / 2, 0.0, 0.5)]


def test_barrier_cost_is_measured_once_per_round_at_the_ranks_rate_of_collectives() -> None:
    class Worker:
        def __init__(self, ranks: int) -> None:
            self.ranks = ranks

        def call(self, name: str, prompts: list, new_tokens: int) -> list[dict]:
            rank = {"seconds": 1.0, "tokens": [[1]] * len(prompts), "peak_rss_mib": 1}
            computing = [3.0, 5.0][: self.ranks]
            return [rank | {"parts": parts(c, 0.0, 0.5), "meetings": 500} for c in computing]

    asked: list[float] = []

    class Cores:
        def __init__(self, num_cores: int) -> None:
            self.num_cores = num_cores

        def kept_share(self, milliseconds: float) -> float:
            asked.append(milliseconds)
            return [0.8, 0.6, 0.9][len(asked) - 1]

    def measured(cores: Any, rounds: int = 1) -> dict[str, Any]:
        job = make_job("batch8", 100)
        return bench_generate.measure(running, job, rounds, pause_s=0.0, barrier_cost=cores)[0]

    running: Any = {"one": Worker(1), "two": Worker(2)}
    figures = measured(Cores(2), rounds=3)
    assert asked == [pytest.approx(8.0)] * 3
    assert figures["two"]["meeting"]["share"]["median"] == 0.8
    assert figures["two"]["meeting"]["every_ms"] == pytest.approx(8.0)
    assert "meeting" not in figures["one"]
    assert "meeting" not in measured(None)["two"]
    assert "meeting" not in measured(Cores(4))["two"], "its ranks have two cores each"


def test_made_tokens_choose_exactly_the_given_experts() -> None:
    weights = make_weights(SMALL)
    ids_TK = make_ids(SMALL, 40, "uniform")
    logits_TE = make_tokens(weights, ids_TK) @ weights.gate_ED.T
    assert torch.equal(logits_TE.topk(SMALL.top_k).indices, ids_TK)
    assert all(len(set(row)) == SMALL.top_k for row in ids_TK.tolist())


def test_reference_is_a_weighted_sum_of_experts() -> None:
    weights = make_weights(SMALL)
    ids_TK = torch.tensor([[4, 0, 2]])
    x_TD = make_tokens(weights, ids_TK)
    x_D = x_TD[0].double()
    gates_K = (weights.gate_ED.double() @ x_D)[ids_TK[0]].softmax(0)
    expected_D = torch.zeros(SMALL.hidden, dtype=torch.float64)
    for gate, expert in zip(gates_K, ids_TK[0], strict=True):
        up = weights.w13_E2FD[expert].double() @ x_D
        hidden = torch.nn.functional.silu(up[: SMALL.ffn]) * up[SMALL.ffn :]
        expected_D += gate * (weights.w2_EDF[expert].double() @ hidden)
    torch.testing.assert_close(reference(weights, x_TD, ids_TK)[0], expected_D)


def test_a_gate_with_more_experts_than_dims_is_refused() -> None:
    with pytest.raises(ValueError, match="--experts 9: must be at most --hidden 8"):
        make_weights(MoEShape(hidden=8, experts=9))


def test_shares_tile_the_whole() -> None:
    parts = [share(10, 4, rank) for rank in range(4)]
    assert [(part.start, part.stop) for part in parts] == [(0, 3), (3, 6), (6, 8), (8, 10)]


def test_moe_case_counts_flops_and_bytes() -> None:
    shape = MoEShape()
    assert shape.flops(4096) == 2 * 3 * 512 * 1024 * 2 * 4096
    assert shape.weight_bytes == 8 * 3 * 512 * 1024 * 4


def test_bench_checkpoint_has_57_7_million_parameters() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mixtral", **hugging_face_fields("mixtral", SIZES["bench"]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 57_692_672


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_decided_by_its_seed(family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_checkpoint(family, tmp_path / name, seed=seed)
        files.append(load_file(tmp_path / name / "model.safetensors"))
    first, again, other = files
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    norms = [tensor for name, tensor in first.items() if name.endswith("norm.weight")]
    assert norms and not any(math.isclose(float(norm.std()), 0) for norm in norms)
    assert all(tensor.dtype == torch.float32 for tensor in first.values())


def test_a_checkpoint_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no field 'num_expert'"):
        make_checkpoint("mixtral", tmp_path, overrides={"num_expert": 2})
    with pytest.raises(ValueError, match="family 'gpt'"):
        make_checkpoint("gpt", tmp_path)
    with pytest.raises(ValueError, match="size 'huge'"):
        make_checkpoint("mixtral", tmp_path, size="huge")


def test_a_hot_rank_is_refused_for_a_checkpoint_that_exists(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="--hot 4.0: .* exists"):
        bench_generate.main(["--checkpoint", str(tmp_path), "--hot", "4"])


def test_the_hot_half_of_a_routers_rows_is_multiplied(tmp_path: Path) -> None:
    gate = torch.ones(4, 3)
    save_file(
        {"mlp.gate.weight": gate.clone(), "x.gate_proj.weight": gate.clone()},
        tmp_path / "model.safetensors",
    )
    heat_first_rank(tmp_path, 4.0)
    found = load_file(tmp_path / "model.safetensors")
    assert found["mlp.gate.weight"].tolist() == [[4.0] * 3] * 2 + [[1.0] * 3] * 2
    assert torch.equal(found["x.gate_proj.weight"], gate)
