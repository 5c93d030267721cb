"""Ranks that are not alike: free memory, and errors of the device, of one rank alone.

Run: pytest tests/distributed/test_unequal_ranks.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, ModelConfig, ParallelConfig, SchedulerConfig
from engine.generation import builder, memory
from engine.llm import LLM
from engine.request import SamplingParams
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

PROMPTS = [[random.Random(seed).randrange(90) for _ in range(6)] for seed in range(4)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    make_checkpoint("mixtral", path, overrides={"vocab_size": 97})
    return path


def config_of(path: Path, tensor: int = 1, **scheduler: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(path), max_model_len=24),
        scheduler=SchedulerConfig(block_size=4, max_sequences=4, **scheduler),
        parallel=ParallelConfig(tensor=tensor),
    )


def generate_in_little_memory(rank: int, path: Path, tensor: int) -> tuple[int, int, list[Any]]:
    """Complete the prompts where rank r has memory for 6 + r KV blocks."""
    with pytest.MonkeyPatch.context() as patch:
        num_kv_blocks = builder.num_kv_blocks

        def in_little_memory(*args: Any, bytes_per_block: int, **options: Any) -> int:
            patch.setattr(memory, "_free_bytes", lambda *_: ((6 + rank) * bytes_per_block, ""))
            return num_kv_blocks(*args, bytes_per_block=bytes_per_block, **options)

        patch.setattr(builder, "num_kv_blocks", in_little_memory)
        llm = LLM(config_of(path, tensor))
    done = llm.generate(PROMPTS, SamplingParams(max_new_tokens=12, ignore_eos=True))
    assert llm.report is not None
    blocks = llm.resolved_settings["scheduler.kv_cache_blocks"]
    preemptions = sum(each.preemptions for each in llm.report.ranks)
    llm.close()
    return blocks, preemptions, [each.token_ids for each in done]


def test_every_rank_has_the_kv_blocks_of_the_one_with_the_least_memory(checkpoint: Path) -> None:
    (of_tensor_ranks, other) = run_ranks(generate_in_little_memory, 2, checkpoint, 2)
    blocks, preemptions, tokens = of_tensor_ranks
    assert other == of_tensor_ranks
    assert blocks == 6
    assert preemptions > 0  # which both ranks have decided alike
    for of_data_rank in run_ranks(generate_in_little_memory, 2, checkpoint, 1):
        assert of_data_rank[0] == 6
        assert of_data_rank[2] == tokens
