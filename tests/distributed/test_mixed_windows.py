"""Windows (gpt-oss) and chunks (Llama 4) of some layers, through the whole engine.

Against transformers.

Run: pytest tests/distributed/test_mixed_windows.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from engine.llm import LLM
from engine.request import SamplingParams
from tests.helpers.model_cases import CASES, redraw
from tests.helpers.ranks import run_ranks

NEW_TOKENS = 9
# Prompts of several windows or chunks (4) and blocks (4), the first of which they share.
SHARED = [(7 * i + 3) % 97 for i in range(14)]
PROMPTS = [[*SHARED, *own] for own in ([5, 9, 1], [44], [80, 2, 2, 31, 6, 17, 90], [], [3, 3])]


@pytest.fixture(scope="module", params=["gpt-oss", "llama4"])
def checkpoint(request, tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """A checkpoint, and how transformers continues the prompts."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(
        CASES[request.param].config(), attn_implementation="eager"
    )
    redraw(model, torch.Generator().manual_seed(1))
    path, found = tmp_path_factory.mktemp("checkpoint"), []
    model.eval().save_pretrained(path)
    with torch.inference_mode():
        for prompt in PROMPTS:
            tokens = torch.tensor([prompt])
            for _ in range(NEW_TOKENS):
                logits = model(tokens, use_cache=False).logits
                tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
            found.append(tokens[0, len(prompt) :].tolist())
    return path, found


def generate(
    rank: int, path: Path, tensor: int, schedulers: list[dict[str, Any]]
) -> list[list[list[int]]]:
    """Return the tokens of two rounds of the same prompts with each scheduler."""
    found = []
    for scheduler in schedulers:
        llm = LLM(
            Config(
                runtime=RuntimeConfig(device="cpu", timeout_s=30.0, threads=1),
                model=ModelConfig(path=str(path), dtype="float32", max_model_len=48),
                scheduler=SchedulerConfig(block_size=4, **scheduler),
                parallel=ParallelConfig(tensor=tensor),
            )
        )
        params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
        for _ in range(2):
            found.append([each.token_ids for each in llm.generate(PROMPTS, params)])
        llm.close()
    return found


def test_tokens_are_those_of_transformers_whatever_the_cache_holds(checkpoint):
    path, expected = checkpoint
    schedulers = [
        {"kv_cache_blocks": 64},
        {"kv_cache_blocks": 64, "max_batch_tokens": 5},  # prompts in chunks
        {"kv_cache_blocks": 14},  # too few for all: sequences are preempted
        {"kv_cache_blocks": 64, "prefix_cache": False},
    ]
    (found,) = run_ranks(generate, 1, path, 1, schedulers)
    assert found == [expected] * 8


@pytest.mark.parametrize("tensor", [1, 2], ids=["expert ranks", "tensor ranks"])
def test_two_ranks_give_the_tokens_of_transformers(checkpoint, tensor):
    path, expected = checkpoint
    for found in run_ranks(generate, 2, path, tensor, [{"kv_cache_blocks": 64}]):
        assert found == [expected] * 2
