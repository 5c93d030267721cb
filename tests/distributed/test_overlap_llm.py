"""Every layout and payload through the whole engine: the same completions.

Run: pytest tests/distributed/test_overlap_llm.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from engine.config.loader import config_from_tree
from engine.llm import LLM
from engine.moe.dispatch import chunk_layout as overlap
from engine.moe.dispatch import layout_policy as layouts
from engine.request import SamplingParams
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

PROMPTS = [
    [random.Random(seed).randrange(90) for _ in range(length)]
    for seed, length in enumerate([5, 17, 1, 30, 8, 12, 3, 21])
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("olmoe")
    make_checkpoint("olmoe", path, overrides={"vocab_size": 97, "num_experts": 6})
    return path


def generate(
    rank: int, path: Path, settings: list[dict[str, Any]], parallel: dict[str, int]
) -> list[dict[str, Any]]:
    """Completions of one job under each setting of `moe`; no step is too small for anything."""
    patch = pytest.MonkeyPatch()
    patch.setattr(overlap, "MIN_CHUNK_ROWS", 1)
    patch.setattr(layouts, "COLLECTIVE_BYTES", 1)
    found = []
    for setting in settings:
        config = Config(
            model=ModelConfig(path=str(path), max_model_len=64),
            scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4, max_batch_tokens=24),
            moe=config_from_tree({"model": {"path": "."}, "moe": setting}).moe,
            parallel=ParallelConfig(**parallel),
            runtime=RuntimeConfig(shared_memory=False),
        )
        llm = LLM(config)
        params = SamplingParams(max_new_tokens=16, ignore_eos=True, logprobs=True)
        done = llm.generate(PROMPTS, params)
        found.append(
            {
                "done": [(item.token_ids, item.logprobs) for item in done],
                "chosen": [layer.layout_policy.choices for layer in llm.model.moe_layers],
                "chunks": [layer.num_chunks for layer in llm.model.moe_layers],
            }
        )
        llm.close()
    return found


DROP = {"capacity": {"policy": "token_drop", "factor": "1"}}
PLAIN = {"dispatch": {"deduplicate": False}}
AUTO = {"overlap": {"chunks": "auto"}}
TOKENS = {"overlap": {"chunks": 3, "by": "tokens"}}
SETTINGS = [PLAIN, {}, AUTO, TOKENS, {**PLAIN, **DROP}, {**AUTO, **DROP}, {**TOKENS, **DROP}]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {}),
        pytest.param(4, {"tensor": 2}, marks=pytest.mark.long),
        pytest.param(4, {"expert": 2}, marks=pytest.mark.long),
    ],
)
def test_completions_do_not_depend_on_layout_or_payload(checkpoint, world, parallel):
    results = run_ranks(generate, world, checkpoint, SETTINGS, parallel, timeout=240)
    plain, dropping = results[0][0]["done"], results[0][4]["done"]
    assert plain != dropping, "capacity binds"
    for result in results:
        for setting, one in zip(SETTINGS, result, strict=True):
            expected = dropping if "capacity" in setting else plain
            assert one["done"] == expected, "to the last bit of every log probability"
    for setting, *of_ranks in zip(SETTINGS, *results, strict=True):
        first = of_ranks[0]
        assert all(one["chunks"] == first["chunks"] for one in of_ranks)
        assert all(one["chosen"] == first["chosen"] for one in of_ranks[: world // 2])
        auto = setting.get("overlap", {}).get("chunks") == "auto"
        assert bool(first["chosen"][0]) == auto, "a choice is made by the end of the job"
        assert all(chosen == first["chosen"][0] for chosen in first["chosen"])
