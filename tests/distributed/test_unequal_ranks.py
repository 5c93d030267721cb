"""Ranks that are not alike: free memory, and errors of the device, of one rank alone.

Run: pytest tests/distributed/test_unequal_ranks.py
"""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config, ModelConfig, ParallelConfig, SchedulerConfig
from engine.distributed.errors import RankError
from engine.generation import builder, memory
from engine.llm import LLM
from engine.models.decoder import CausalLM
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


ERRORS = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
    "no memory on the host": RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes."),
    "error of the device": RuntimeError("CUDA error: an illegal memory access was encountered\nx"),
}


def start_where_rank_1_fails(rank: int, path: Path, error: str, method: str) -> str:
    """Build an engine; rank 1 raises an error where it builds the model or packs its weights."""

    def fail(*_: Any) -> None:
        raise ERRORS[error]

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(*((builder, method) if method == "build" else (CausalLM, method)), fail)
        with pytest.raises(RankError) as caught:
            LLM(config_of(path, kv_cache_blocks=8))
    return str(caught.value)


@pytest.mark.parametrize("method", ["build", "finalize_weights"])
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_one_ranks_device_is_raised_by_all_with_rank_host_and_what_to_do(
    checkpoint: Path, error: str, method: str
) -> None:
    first, second = run_ranks(start_where_rank_1_fails, 2, checkpoint, error, method, timeout=30)
    assert first == second
    assert first.startswith(f"rank 1: {socket.gethostname()}: ")
    assert str(ERRORS[error]).splitlines()[0] in first
    what = "nvidia-smi" if error == "error of the device" else "scheduler.max_batch_tokens"
    assert what in first
    assert "\n" not in first
