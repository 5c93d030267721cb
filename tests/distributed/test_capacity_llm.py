"""Capacity through the whole engine: the same decisions on any number of ranks, and their reports.

Run: pytest tests/distributed/test_capacity_llm.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from engine.config import (
    CapacityConfig,
    Config,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    SchedulerConfig,
)
from engine.llm import LLM
from engine.request import Completion, SamplingParams
from tests.helpers.ranks import RanksFailed, run_ranks
from tools.make_random_checkpoint import FAMILIES, make_checkpoint

PROMPTS = [
    [random.Random(seed).randrange(90) for _ in range(length)]
    for seed, length in enumerate([5, 17, 1, 30, 8, 12, 3, 21])
]
NEW = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("olmoe")
    make_checkpoint("olmoe", path, overrides={"vocab_size": 97, "num_experts": 6})
    return path


def generate(
    rank: int, path: Path, capacity: dict[str, Any], parallel: dict[str, int], chunk: int
) -> dict[str, Any]:
    config = Config(
        model=ModelConfig(path=str(path), max_model_len=64),
        # Each rank runs a common prefix once, so its decisions depend on the number of ranks.
        scheduler=SchedulerConfig(
            kv_cache_blocks=128, block_size=4, max_batch_tokens=chunk, prefix_cache=False
        ),
        moe=MoEConfig(capacity=CapacityConfig(**capacity)),
        parallel=ParallelConfig(**parallel),
    )
    llm = LLM(config)
    log = llm.record_decisions()
    done = llm.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    report = llm.run(_Nothing(), lambda _: None)
    llm.close()
    kept = {}
    for entry in log:
        for t in range(len(entry.request_T)):
            token = (entry.layer, int(entry.request_T[t]), int(entry.position_T[t]))
            assert token not in kept, "a token was decided on twice"
            chosen = entry.topk_ids_TK[t].tolist()
            kept[token] = (chosen, entry.keep_TK[t].tolist(), bool(entry.eligible_T[t]))
    return {"done": done, "kept": kept, "idle": report}


class _Nothing:
    """A source that is exhausted."""

    limit = 1

    def take(self) -> None:
        return None


def run(path: Path, world: int, capacity: dict[str, Any], *, chunk: int = 2048, **parallel: int):
    results = run_ranks(generate, world, path, capacity, parallel, chunk, timeout=120)
    kept: dict[tuple, tuple] = {}
    for result in results:
        kept |= result["kept"]
        assert [item.token_ids for item in result["done"]] == [
            item.token_ids for item in results[0]["done"]
        ]
    return results[0]["done"], kept


def layers_and_k(path: Path) -> tuple[int, int]:
    hf = json.loads((path / "config.json").read_text())
    return hf["num_hidden_layers"], hf["num_experts_per_tok"]


@pytest.mark.parametrize(
    "capacity",
    [
        {"policy": "token_drop", "factor": "1"},
        {"policy": "token_drop", "factor": "0.8", "order": "random", "selection": "radix"},
        {"policy": "token_drop", "factor": "1", "order": "first"},
    ],
)
def test_9_a_job_keeps_the_same_assignments_on_1_2_and_4_ranks(checkpoint, capacity):
    done, kept = run(checkpoint, 1, capacity)
    num_layers, _ = layers_and_k(checkpoint)
    assert len(kept) == num_layers * sum(map(len, PROMPTS))
    assert any(not all(keep) for _, keep, _ in kept.values()), "something is dropped"
    for world in (2, 4):
        others, other_kept = run(checkpoint, world, capacity)
        assert other_kept == kept
        assert [item.token_ids for item in others] == [item.token_ids for item in done]
        assert [item.capacity.dropped for item in others] == [
            item.capacity.dropped for item in done
        ]
        for item, other in zip(done, others, strict=True):
            assert other.capacity.gate_mass_kept == pytest.approx(item.capacity.gate_mass_kept)


@pytest.mark.parametrize("parallel", [{"expert": 4, "tensor": 2}, {"expert": 2}])
@pytest.mark.parametrize("scope", ["expert", "rank"])
def test_tensor_ranks_and_replicas_count_a_request_once(checkpoint, parallel, scope):
    # Tensor ranks' scores differ in the last bits (attention is summed in parts), and each replica
    # is a capacity group of its own, so sets may differ from those of four plain ranks.
    capacity = {"policy": "token_drop", "factor": "1", "order": "first", "scope": scope}
    done, kept = run(checkpoint, 4, capacity, **parallel)
    num_layers, _ = layers_and_k(checkpoint)
    assert len(kept) == num_layers * sum(map(len, PROMPTS))
    lost = sum(keep.count(False) for _, keep, _ in kept.values())
    assert sum(item.capacity.dropped for item in done) == lost > 0
    for item in done:
        mine = [keep.count(False) for (_, r, _), (_, keep, _) in kept.items() if r == item.index]
        assert item.capacity.dropped == sum(mine)


def test_each_completion_reports_its_dropped_assignments(checkpoint):
    done, kept = run(checkpoint, 2, {"policy": "token_drop", "factor": "1"})
    num_layers, top_k = layers_and_k(checkpoint)
    lost = dict.fromkeys(range(len(PROMPTS)), 0)
    for (_, request, _), (_, keep, _) in kept.items():
        lost[request] += keep.count(False)
    for item, prompt in zip(done, PROMPTS, strict=True):
        assert item.capacity.dropped == lost[item.index]
        assert item.capacity.assignments == (len(prompt) + NEW - 1) * num_layers * top_k
        assert 0 < item.capacity.gate_mass_kept <= 1
        assert (item.capacity.gate_mass_kept < 1) == (item.capacity.dropped > 0)
    assert sum(lost.values()) > 0


def test_only_tokens_of_the_listed_phases_are_subject_to_capacity(checkpoint):
    _, prefill = run(checkpoint, 2, {"policy": "token_drop", "factor": "0.5"})
    assert {position < len(PROMPTS[r]) for (_, r, position) in prefill} == {True}
    _, decode = run(checkpoint, 2, {"policy": "token_drop", "factor": "0.5", "phases": ("decode",)})
    assert {position >= len(PROMPTS[r]) for (_, r, position) in decode} == {True}
    assert any(not all(keep) for _, keep, _ in decode.values())
    # In a batch of both, tokens of the other phase pass.
    _, mixed = run(checkpoint, 2, {"policy": "token_drop", "factor": "0.5"}, chunk=24)
    for (_, request, position), (_, keep, eligible) in mixed.items():
        assert eligible == (position < len(PROMPTS[request]))
        assert eligible or all(keep)
    assert not all(eligible for _, _, eligible in mixed.values()), "no batch was mixed"


def test_phases_with_nothing_to_do_are_dropless(checkpoint):
    capacity = {"policy": "token_drop", "factor": "0.5", "phases": ("decode",)}
    results = run_ranks(prompts_only, 2, checkpoint, capacity, timeout=60)
    for done in results:
        assert all(item.capacity.dropped == 0 for item in done)
        assert all(item.capacity.gate_mass_kept == 1.0 for item in done)


def prompts_only(rank: int, path: Path, capacity: dict[str, Any]) -> list[Completion]:
    config = Config(
        model=ModelConfig(path=str(path), max_model_len=64),
        scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4),
        moe=MoEConfig(capacity=CapacityConfig(**capacity)),
    )
    llm = LLM(config)
    done = llm.generate(PROMPTS, SamplingParams(max_new_tokens=1, ignore_eos=True))
    llm.close()
    return done


def reports(rank: int, path: Path, settings: list[dict[str, Any]]) -> list[tuple[Any, list]]:
    """One engine, several policies one after the other."""
    llm = LLM(
        Config(
            model=ModelConfig(path=str(path), max_model_len=64),
            scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4),
        )
    )
    from engine.generation.request_source import ListSource
    from engine.request import Request

    results = []
    for capacity in settings:
        llm.set_capacity(CapacityConfig(**capacity))
        params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
        requests = [
            Request(index=index, id=index, prompt_token_ids=prompt, params=params)
            for index, prompt in enumerate(PROMPTS)
        ]
        done: list[Completion] = []
        share = requests[llm.topology.data_rank :: llm.topology.num_data]
        report = llm.run(ListSource(share), done.extend)
        results.append((report, [item.capacity for item in done]))
    llm.close()
    return results


def test_a_run_reports_every_layer_before_and_after(checkpoint):
    settings = [
        {"policy": "none"},
        {"policy": "token_drop", "factor": "1", "phases": ("prefill", "decode")},
        {"policy": "expanded_drop", "factor": "1", "phases": ("prefill", "decode")},
        {"policy": "none"},
    ]
    num_layers, top_k = layers_and_k(checkpoint)
    results = run_ranks(reports, 3, checkpoint, settings, timeout=90)
    routed = (sum(map(len, PROMPTS)) + len(PROMPTS) * (NEW - 1)) * top_k
    for index, _ in enumerate(settings):
        uses = [use for result in results for use in result[index][1]]
        report = results[0][index][0]
        assert all(result[index][0].layers == report.layers for result in results)
        assert len(report.layers) == num_layers
        for layer in report.layers:
            # Without a policy the last layer runs the tokens that are read alone.
            narrow = settings[index]["policy"] == "none" and layer is report.layers[-1]
            rows = len(PROMPTS) * NEW * top_k if narrow else routed
            assert sum(layer.expert_loads) == rows
            after = sum(layer.expert_loads_after)
            assert after == rows - layer.dropped + layer.added
        assert sum(layer.dropped for layer in report.layers) == sum(use.dropped for use in uses)
        assert sum(layer.added for layer in report.layers) == sum(use.added for use in uses)
    plain, dropped, expanded, again = (results[0][index][0] for index in range(4))
    for report in (plain, dropped, expanded, again):
        most = 3 if report in (plain, again) else 4  # a tie at a cut costs a round
        for layer in report.layers:  # counts, rows out and back; claims replace the counts
            assert 3 * report.steps <= layer.num_collectives <= most * report.steps
        assert sum(layer.bytes_sent for layer in report.layers) == sum(
            rank.bytes_sent for rank in report.ranks
        )
    for report in (plain, again):
        assert report.max_over_mean_after == pytest.approx(report.max_over_mean)
        assert report.speed_bound == 1.0
        assert all(layer.assignments == layer.dropped == 0 for layer in report.layers)
    for report in (dropped, expanded):
        assert report.speed_bound > 1.05
        assert all(layer.assignments == routed for layer in report.layers)
        assert all(layer.dropped > 0 and layer.gate_mass_kept < 1 for layer in report.layers)
    assert all(layer.added == 0 for layer in dropped.layers)
    assert any(layer.added > 0 for layer in expanded.layers)


def impossible(rank: int, path: Path, capacity: dict[str, Any]) -> None:
    LLM(
        Config(
            model=ModelConfig(path=str(path), max_model_len=64),
            moe=MoEConfig(capacity=CapacityConfig(**capacity)),
        )
    )


def test_more_extras_than_a_rank_has_experts_stop_every_rank(checkpoint):
    with pytest.raises(RanksFailed) as caught:
        run_ranks(impossible, 2, checkpoint, {"policy": "expanded_drop", "expand": 4})
    assert str(caught.value).count("moe.capacity.expand = 4: must be at most 3") == 2


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_keeps_the_same_assignments_on_1_and_2_ranks(family, tmp_path):
    make_checkpoint(family, tmp_path, overrides={"vocab_size": 97})
    policies: list[dict[str, Any]] = [{"policy": "token_drop", "factor": "0.7"}]
    if family != "llama4_text":  # refused where weights multiply the experts' input
        policies.append(
            {"policy": "expanded_drop", "factor": "0.7", "scope": "rank", "consensus": "quota"}
        )
    for capacity in policies:
        done, kept = run(tmp_path, 1, capacity)
        others, other_kept = run(tmp_path, 2, capacity)
        assert any(not all(keep) for _, keep, _ in kept.values())
        assert sum(item.capacity.dropped for item in done) > 0
        if capacity["policy"] == "token_drop":  # extras depend on who is local
            assert other_kept == kept
            assert [item.token_ids for item in others] == [item.token_ids for item in done]
