"""A KV cache in float8 through the whole engine (scheduler.kv_dtype: fp8).

Run: pytest tests/distributed/test_float8_cache.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config, ModelConfig, SchedulerConfig
from engine.llm import LLM
from engine.ops.float8_cache import FLOAT8
from engine.request import SamplingParams
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

pytestmark = pytest.mark.long

PROMPTS = [[7, 3, 9, 4, 1, 8, 2, 6, 5][: 3 + each % 7] * 3 for each in range(8)]


def generate(rank: int, path: Path, scheduler: dict[str, Any]) -> tuple[list[list[int]], int]:
    """Return the tokens of every prompt and how often a sequence was preempted."""
    settings = SchedulerConfig(block_size=4, kv_dtype="fp8", **scheduler)
    llm = LLM(Config(model=ModelConfig(path=str(path), max_model_len=64), scheduler=settings))
    cache = llm._runner.cache
    assert all(keys.dtype is FLOAT8 for keys in (*cache.keys, *cache.values))
    per_block = cache.spec.bytes_per_block(4, torch.float32)
    assert 4 * cache.spec.bytes_per_block(4, FLOAT8) == per_block
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    done = [each.token_ids for each in llm.generate(PROMPTS, params)]
    llm.close()
    report = llm.report.ranks[rank]
    assert report.resolved_settings["scheduler.kv_dtype"] == "float8_e4m3fn"
    return done, report.preemptions


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_prefixes_chunks_and_preemption_change_no_token(family, tmp_path):
    make_checkpoint(family, tmp_path)
    plain, _ = run_ranks(generate, 1, tmp_path, {"kv_cache_blocks": 200, "prefix_cache": False})[0]
    few = {"kv_cache_blocks": 16, "max_batch_tokens": 10, "max_sequences": 8}
    tight, preemptions = run_ranks(generate, 1, tmp_path, few)[0]
    assert preemptions and tight == plain
