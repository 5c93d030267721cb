"""The engine on backends that plan once per step, with stand-ins of the libraries' functions.

Run: pytest tests/distributed/test_attention_backends.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, ModelConfig, MoEConfig, OverlapConfig, SchedulerConfig
from engine.generation import builder
from engine.layers.attention_backends.flashinfer import FlashInferAttention
from engine.layers.attention_backends.varlen import VarlenAttention
from engine.llm import LLM
from engine.request import SamplingParams
from tests.helpers import flashinfer_fake
from tests.helpers.ranks import run_ranks
from tests.helpers.varlen_fake import varlen_attn
from tools.make_random_checkpoint import make_checkpoint

pytestmark = pytest.mark.long

PROMPTS = [[7, 3, 9, 4, 1, 8, 2, 6, 5][: 3 + each % 7] * 2 for each in range(6)]
PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)


def generate(rank: int, path: Path, two_batch: bool) -> dict[str, Any]:
    """Return the tokens of every prompt, by backend."""

    def flashinfer(*_: Any, device: Any, dtype: Any, kv_dtype: Any, block_size: int) -> Any:
        return FlashInferAttention(device, dtype, kv_dtype, block_size, flashinfer_fake)

    found = {}
    chosen = {"flashinfer": flashinfer, "varlen": lambda *_, **__: VarlenAttention(varlen_attn)}
    own = builder.choose_backend
    for name in ("triton", "flashinfer", "varlen"):
        builder.choose_backend = chosen.get(name, own)
        llm = LLM(
            Config(
                model=ModelConfig(path=str(path), max_model_len=64),
                moe=MoEConfig(overlap=OverlapConfig(two_batch=two_batch)),
                # Few tokens per step: decodes and chunks of prompts in one.
                scheduler=SchedulerConfig(kv_cache_blocks=64, block_size=4, max_batch_tokens=12),
            )
        )
        found[name] = [each.token_ids for each in llm.generate(PROMPTS, PARAMS)]
        assert llm.report.ranks[rank].resolved_settings["attention.backend"] == name
        llm.close()
    builder.choose_backend = own
    return found


@pytest.mark.parametrize(
    ("family", "names", "two_batch"),
    [("qwen3_moe", ("flashinfer", "varlen"), True), ("deepseek_v2", ("flashinfer",), False)],
)
def test_tokens_do_not_depend_on_the_backend(family, names, two_batch, tmp_path):
    make_checkpoint(family, tmp_path)
    found = run_ranks(generate, 2 if two_batch else 1, tmp_path, two_batch, timeout=120)[0]
    assert all(found[name] == found["triton"] for name in names)
