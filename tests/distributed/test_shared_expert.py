"""A balanced shared expert on real gloo ranks: results, traffic, and what the report says.

Run: pytest tests/distributed/test_shared_expert.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import (
    CapacityConfig,
    Config,
    DispatchConfig,
    ModelConfig,
    MoEConfig,
    OverlapConfig,
    ParallelConfig,
    RuntimeConfig,
    SchedulerConfig,
)
from engine.config.loader import config_from_tree
from engine.distributed import bootstrap
from engine.layers.mlp import DenseMLP
from engine.llm import LLM
from engine.moe.dispatch import layout_policy as layouts
from engine.moe.dispatch.two_batch import interleave
from engine.moe.placement.placement import LayerPlacement
from engine.moe.router import RouterSpec
from engine.request import SamplingParams
from tests.helpers.layer_cases import HIDDEN, build, step_of, tokens_of
from tests.helpers.ranks import RanksFailed, run_ranks
from tools.make_random_checkpoint import make_checkpoint

QWEN = RouterSpec(num_experts=12, top_k=4)
DEEPSEEK = RouterSpec(num_experts=12, top_k=4, scale=2.5, num_groups=4, top_groups=3)
POLICIES = [
    {"policy": "none"},
    {"policy": "token_drop", "factor": "1.2"},
    {"policy": "token_drop", "factor": "1.2", "selection": "radix", "scope": "rank"},
    {"policy": "token_drop", "factor": "1.2", "consensus": "quota"},
    {"policy": "token_drop", "factor": "1.2", "consensus": "local"},
]
GATHERED = POLICIES[:2]  # by claims, as copies need them
LARGE = 10**9  # tokens, as if the step were large enough for unique rows


def shared_expert(ffn: int, gated: bool) -> DenseMLP:
    generator = torch.Generator().manual_seed(5)
    module = DenseMLP(HIDDEN, ffn, torch.device("cpu"), torch.float32, output_gate=gated)
    for weight in module.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return module


def layers_of(
    rank: int,
    counts: list[int],
    spec: RouterSpec,
    gated: bool,
    ways: list[dict[str, Any]],
    policies: list[dict[str, Any]] = POLICIES,
) -> list[list[dict[str, Any]]]:
    """Outputs and counters by way (fields of moe, row_limit, placement) and policy."""
    runtime = RuntimeConfig(shared_memory=False)
    topology = bootstrap.start(Config(model=ModelConfig(path="unused"), runtime=runtime))
    x = tokens_of(rank, counts[rank])
    found = []
    for way in ways:
        way = dict(way)
        limit, dispatch = way.pop("row_limit", None), way.pop("dispatch", {})
        placement = way.pop("placement", None)
        moe = MoEConfig(dispatch=DispatchConfig(partial_sums=True, **dispatch), **way)
        config = Config(model=ModelConfig(path="unused"), moe=moe)
        shared = shared_expert(48, gated)
        layer = build(topology, config, spec, shared, placement=placement)
        layer.row_limit = limit
        row = []
        for settings in policies:
            layer.set_capacity(CapacityConfig(**settings))
            layer.telemetry.loads.clear()
            calls, sent = layer.num_collectives, layer.bytes_sent
            out = layer(x, step_of(topology, counts, 1), LARGE)
            row.append(
                {
                    "out": out,
                    "collectives": layer.num_collectives - calls,
                    "bytes": layer.bytes_sent - sent,
                    "rows": layer.telemetry.loads.take_rows()[0],
                    "moved": layer.telemetry.loads.shared_moved.get(3),
                }
            )
        found.append(row)
    bootstrap.stop(topology)
    return found


BALANCED = {"shared_expert": "balanced"}
CASES = [
    ([40, 33], QWEN, True),
    ([30, 8, 41], DEEPSEEK, False),
    ([35, 0, 12], QWEN, True),
    ([0, 0], QWEN, False),
]


@pytest.mark.parametrize(("counts", "spec", "gated"), CASES)
def test_a_balanced_shared_expert_gives_the_replicated_results_up_to_rounding(counts, spec, gated):
    ways = [
        {},
        BALANCED,
        {**BALANCED, "overlap": OverlapConfig(chunks=2, by="experts")},
        {**BALANCED, "overlap": OverlapConfig(chunks=3, by="tokens")},
    ]
    results = run_ranks(layers_of, len(counts), counts, spec, gated, ways, timeout=120)
    for result in results:
        replicated, balanced, *chunked = result
        for index, expected in enumerate(replicated):
            assert expected["moved"] is None
            for row in (balanced, *chunked):
                one = row[index]
                torch.testing.assert_close(one["out"], expected["out"], rtol=1e-5, atol=1e-5)
                assert one["rows"] == expected["rows"], "rows of routed experts are as they were"
                assert one["moved"] == results[0][1][index]["moved"] or row is not balanced
            assert balanced[index]["collectives"] == expected["collectives"]
    moved = [one["moved"] for one in results[0][1]]
    assert all(moved) if max(counts) else not any(moved)


def test_no_row_more_is_sent_only_counts_a_bit_and_a_weight():
    counts, world = [40, 33], 2
    results = run_ranks(layers_of, world, counts, QWEN, True, [{}, BALANCED])
    # Of each rank: candidates per rank and its tokens.
    more_counts = 8 * (world + 1) * (world - 1)
    for replicated, balanced in results:
        more = balanced[0]["bytes"] - replicated[0]["bytes"]
        assert more >= more_counts and (more - more_counts) % 16 == 0
        # 6 experts and the shared one: 28 bytes of weights and 1 of bits where there were 24 and 1,
        # both in 32 bytes.
        assert more == more_counts


def test_the_most_loaded_rank_has_less_to_do():
    counts = [40, 40, 40]
    results = run_ranks(layers_of, 3, counts, QWEN, False, [BALANCED])
    rows = [result[0][0]["rows"] for result in results]
    assert max(rows) > 1.1 * sum(rows) / 3, "the case is unbalanced"
    assert results[0][0][0]["moved"] > 0
    assert len({result[0][0]["moved"] for result in results}) == 1, "every rank knows all moves"


def test_shared_rows_move_beside_the_rows_of_copies():
    # Expert 0 is hot; ranks 1 and 2 hold further experts' copies, of homes in no order.
    homes = (2, 0, 1, 0, 2, 1, 2, 0, 1, 1, 0, 2)
    copies = tuple({0: (0,), 3: (1, 2)}.get(expert, ()) for expert in range(12))
    placement = LayerPlacement(homes, copies)
    ways = [{}, {"placement": placement}, {**BALANCED, "placement": placement}]
    counts = [40, 13, 25]
    results = run_ranks(layers_of, 3, counts, QWEN, True, ways, GATHERED, timeout=120)
    for whole, copied, balanced in results:
        for expected, one in zip(copied, balanced, strict=True):
            torch.testing.assert_close(one["out"], expected["out"], rtol=1e-5, atol=1e-5)
            assert one["rows"] == expected["rows"] and one["moved"]
            assert one["collectives"] == expected["collectives"]
        torch.testing.assert_close(balanced[0]["out"], whole[0]["out"], rtol=1e-5, atol=1e-5)


def test_shared_rows_stay_at_home_in_rounds_and_where_rows_are_not_deduplicated():
    counts = [40, 33]
    ways = [{}, {**BALANCED, "row_limit": 30}, {"row_limit": 30}]
    for replicated, rounds, plain in run_ranks(layers_of, 2, counts, QWEN, True, ways):
        assert rounds[0]["moved"] == 0
        assert torch.equal(rounds[0]["out"], plain[0]["out"]), "bit for bit"
        torch.testing.assert_close(rounds[0]["out"], replicated[0]["out"], rtol=1e-5, atol=1e-5)


def test_narrow_rows_carry_the_input_of_shared_rows_that_move():
    ways = [{}, {**BALANCED, "dispatch": {"dtype": "bf16"}}]
    for replicated, narrow in run_ranks(layers_of, 2, [40, 33], QWEN, True, ways):
        assert narrow[0]["moved"]
        torch.testing.assert_close(narrow[0]["out"], replicated[0]["out"], rtol=2e-2, atol=2e-2)


def micro_batches(rank: int, counts: list[int]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A replicated call, the same tokens as two balanced micro-batches, and the rows moved."""
    moe = MoEConfig(
        dispatch=DispatchConfig(partial_sums=True),
        overlap=OverlapConfig(two_batch=True),
        shared_expert="balanced",
    )
    topology = bootstrap.start(Config(model=ModelConfig(path="unused")))
    patch = pytest.MonkeyPatch()
    patch.setattr(layouts, "COLLECTIVE_BYTES", 1)
    plain = Config(model=ModelConfig(path="unused"))
    x, shared = tokens_of(rank, counts[rank]), shared_expert(48, True)
    whole = build(topology, plain, QWEN, shared)(x)
    layer = build(topology, Config(model=ModelConfig(path="unused"), moe=moe), QWEN, shared)
    cut = len(x) // 2
    parts = [
        layer.steps(part, None, LARGE, micro_batch=index)
        for index, part in enumerate((x[:cut], x[cut:]))
    ]
    joined = torch.cat(interleave(parts))
    moved = layer.telemetry.loads.shared_moved[3]
    bootstrap.stop(topology)
    return whole, joined, moved


def test_each_of_two_micro_batches_balances_its_own_tokens():
    for whole, joined, moved in run_ranks(micro_batches, 2, [40, 33]):
        torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-5)
        assert moved > 0


def refuse(rank: int, with_shared: bool) -> None:
    topology = bootstrap.start(Config(model=ModelConfig(path="unused")))
    moe = MoEConfig(dispatch=DispatchConfig(partial_sums=True), shared_expert="balanced")
    config = Config(model=ModelConfig(path="unused"), moe=moe)
    layer = build(topology, config, QWEN, shared_expert(48, False) if with_shared else None)
    layer.set_capacity(CapacityConfig(policy="expanded_drop", factor="1"))


@pytest.mark.parametrize(
    ("with_shared", "words"),
    [(False, "the model has no shared expert"), (True, "rows of which other ranks do not know")],
)
def test_what_cannot_be_balanced_is_refused_in_words(with_shared, words):
    with pytest.raises(RanksFailed, match=words):
        run_ranks(refuse, 2, with_shared)


# Through the engine

PROMPTS = [
    [random.Random(seed).randrange(90) for _ in range(length)]
    for seed, length in enumerate([5, 17, 1, 30, 8, 12, 3, 21])
]


def generate(rank: int, path: Path, settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Completions of one job under each setting of `moe`; no step is too small for unique rows."""
    pytest.MonkeyPatch().setattr(layouts, "COLLECTIVE_BYTES", 1)
    found = []
    for setting in settings:
        config = Config(
            model=ModelConfig(path=str(path), max_model_len=64),
            scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4, max_batch_tokens=24),
            moe=config_from_tree({"model": {"path": "."}, "moe": setting}).moe,
            parallel=ParallelConfig(),
            runtime=RuntimeConfig(shared_memory=False),
        )
        llm = LLM(config)
        params = SamplingParams(max_new_tokens=16, ignore_eos=True)
        done = llm.generate(PROMPTS, params)
        moved = [layer.telemetry.loads.shared_moved for layer in llm.model.moe_layers]
        report = llm.report
        layers = [] if report is None else report.layers
        found.append(
            {
                "tokens": [item.token_ids for item in done],
                "moved": moved[0],
                "reported": [layer.shared_rows_moved for layer in layers],
            }
        )
        llm.close()
    return found


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v2"])
@pytest.mark.parametrize("capacity", [{}, {"policy": "token_drop", "factor": "1.2"}])
def test_greedy_tokens_are_those_of_a_replicated_shared_expert(tmp_path, family, capacity):
    make_checkpoint(family, tmp_path, overrides={"vocab_size": 97})
    sums = {"dispatch": {"partial_sums": True}, "capacity": capacity}
    settings = [sums, {**sums, "shared_expert": "balanced"}]
    results = run_ranks(generate, 2, tmp_path, settings, timeout=240)
    for replicated, balanced in results:
        assert balanced["tokens"] == replicated["tokens"]
        assert replicated["moved"] == {} and sum(balanced["moved"].values()) > 0
    replicated, balanced = results[0]
    assert set(replicated["reported"]) == {None}
    assert sum(balanced["reported"]) > 0
