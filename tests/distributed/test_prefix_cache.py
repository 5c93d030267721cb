"""Shared prefixes through the whole engine: less runs, and results are the same to the bit.

Run: pytest tests/distributed/test_prefix_cache.py

The absorbed products of latent attention are torch's, whose bits for a row depend on how many rows
there are; for equality to the bit the test has them row by row.
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
    ModelConfig,
    MoEConfig,
    OverlapConfig,
    ParallelConfig,
    SchedulerConfig,
)
from engine.llm import LLM
from engine.moe.dispatch import chunk_layout, layout_policy
from engine.ops.linear import linear
from engine.request import Completion, SamplingParams
from tests.helpers.ops_cases import needs_native
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import FAMILIES, make_checkpoint

WITH_STATES = {"qwen3_next", "qwen3_5_moe_text"}  # share nothing: test_recurrent_states.py
DRAW = random.Random(24)
PREFIXES = [[DRAW.randrange(90) for _ in range(length)] for length in (16, 23, 8)]
PROMPTS = [
    PREFIXES[DRAW.randrange(3)] + [DRAW.randrange(90) for _ in range(DRAW.randint(0, 9))]
    for _ in range(24)
]
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "top_k": 30, "seed": 5}
PARAMS = [  # greedy and sampled in turns
    SamplingParams(max_new_tokens=7, ignore_eos=True, logprobs=True, **(SAMPLED if odd else {}))
    for odd in (0, 1) * 12
]


def generate(
    rank: int,
    path: Path,
    scheduler: dict[str, Any],
    parallel: dict[str, int],
    moe: MoEConfig,
    by_row: bool,
) -> dict[bool, tuple[list[Completion], int, int]]:
    """Run the prompts without and with the cache; by that, the completions, and the prefill tokens
    and the preemptions of this rank.
    """
    if by_row:
        torch.bmm = bmm_by_row
    chunk_layout.MIN_CHUNK_ROWS = layout_policy.COLLECTIVE_BYTES = 1
    results = {}
    for cache in (False, True):
        settings = {"kv_cache_blocks": 128, "block_size": 4, "max_batch_tokens": 48, **scheduler}
        llm = LLM(
            Config(
                model=ModelConfig(path=str(path), max_model_len=64, dtype="float32"),
                scheduler=SchedulerConfig(**settings, prefix_cache=cache),
                moe=moe,
                parallel=ParallelConfig(**parallel),
            )
        )
        done = llm.generate(PROMPTS, PARAMS)
        assert llm.report is not None
        own = llm.report.ranks[rank]
        results[cache] = (done, own.tokens_prefill, own.preemptions)
        llm.close()
    return results


def bmm_by_row(left_HTN: torch.Tensor, right_HNC: torch.Tensor) -> torch.Tensor:
    rows = [
        linear(left_TN.contiguous(), right_NC.T.contiguous())
        for left_TN, right_NC in zip(left_HTN, right_HNC, strict=True)
    ]
    return torch.stack(rows)


def run(path, world, scheduler=None, parallel=None, moe=None, by_row=True):
    parts = (scheduler or {}, parallel or {}, moe or MoEConfig(), by_row)
    results = run_ranks(generate, world, path, *parts, timeout=120)
    (plain, _, _), (cached, _, _) = results[0][False], results[0][True]
    tokens = [sum(result[cache][1] for result in results) for cache in (False, True)]
    preemptions = sum(result[True][2] for result in results)
    return plain, cached, tokens, preemptions


def assert_same_to_the_bit(plain: list[Completion], cached: list[Completion]) -> None:
    assert [item.token_ids for item in cached] == [item.token_ids for item in plain]
    assert [item.logprobs for item in cached] == [item.logprobs for item in plain]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    def make(family: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"prefix-{family}"
        if not path.exists():
            make_checkpoint(family, path, overrides={"vocab_size": 97})
        return path

    return make


@needs_native
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WITH_STATES))
def test_results_are_equal_to_the_bit_and_a_prefix_runs_once_per_rank(family, world, checkpoint):
    plain, cached, (all_tokens, fewer_tokens), _ = run(checkpoint(family), world)
    assert_same_to_the_bit(plain, cached)
    assert not any(item.cached_tokens for item in plain)
    saved = sum(item.cached_tokens for item in cached)
    assert all_tokens == sum(map(len, PROMPTS)) == fewer_tokens + saved
    assert saved > all_tokens // 3


def test_latent_attention_gives_the_same_tokens_and_logprobs_within_rounding(checkpoint):
    plain, cached, _, _ = run(checkpoint("deepseek_v2"), 2, by_row=False)
    assert [item.token_ids for item in cached] == [item.token_ids for item in plain]
    for item, other in zip(cached, plain, strict=True):
        assert item.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@needs_native
@pytest.mark.parametrize(
    ("scheduler", "parallel", "moe"),
    [
        ({}, {"tensor": 2}, MoEConfig()),
        ({}, {"expert": 1}, MoEConfig()),
        ({}, {}, MoEConfig(overlap=OverlapConfig(two_batch=True))),
        ({"max_batch_tokens": 9}, {}, MoEConfig()),
        ({"block_size": 16, "kv_cache_blocks": 32}, {}, MoEConfig()),
        ({"kv_cache_blocks": 24}, {}, MoEConfig()),
    ],
    ids=["tensor", "replicas", "two_batch", "chunks", "blocks of 16", "preemption"],
)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_however_a_job_is_spread_its_results_are_equal_to_the_bit(
    family, scheduler, parallel, moe, checkpoint
):
    plain, cached, tokens, preemptions = run(checkpoint(family), 2, scheduler, parallel, moe)
    assert_same_to_the_bit(plain, cached)
    assert any(item.cached_tokens for item in cached)
    if scheduler.get("kv_cache_blocks") == 24:
        assert preemptions


def test_under_a_capacity_policy_a_cached_token_does_not_compete_again(checkpoint):
    path = checkpoint("mixtral")
    capacity = CapacityConfig(policy="token_drop", factor="0.5")
    moe = MoEConfig(capacity=capacity)
    plain, cached, _, _ = run(path, 1, moe=moe)
    layers, top_k = 2, 2
    for item, whole in zip(cached, plain, strict=True):
        # The last new token never runs; those that are not prefill are routed in every layer too.
        ran = item.prompt_tokens - item.cached_tokens + item.completion_tokens - 1
        assert item.capacity.assignments == ran * layers * top_k
        assert whole.capacity.assignments == (whole.prompt_tokens + 6) * layers * top_k
        assert item.capacity.dropped <= (item.prompt_tokens - item.cached_tokens) * layers * top_k
    assert sum(item.capacity.dropped for item in cached) > 0
