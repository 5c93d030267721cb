"""The static exchange through the whole engine: completions and loads of the counted way.

Run: pytest tests/distributed/test_static_llm.py
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from engine.config.loader import config_from_tree
from engine.llm import LLM
from engine.moe.dispatch.chunk_tuner import ChunkTuner
from engine.moe.layer_static import COUNTED, STATIC, StaticCalls
from engine.request import SamplingParams
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

PROMPTS = [
    [random.Random(seed).randrange(90) for _ in range(length)]
    for seed, length in enumerate([5, 17, 1, 30, 8, 12, 3])
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("static")
    for family in ("mixtral", "olmoe", "deepseek_v2"):
        make_checkpoint(family, folder / family, overrides={"vocab_size": 97})
    return {family: folder / family for family in ("mixtral", "olmoe", "deepseek_v2")}


def generate(
    rank: int,
    path: Path,
    settings: list[dict[str, Any]],
    parallel: dict[str, int],
    slower: int | None = None,
    model: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Completions and loads of one job under each setting of `moe`.

    model: further settings of the model.
    slower: the way that takes ten times as long, by the tuner's clock.
    """
    patch = pytest.MonkeyPatch()
    calls: Counter[str] = Counter()
    run = StaticCalls.run

    def counted(self: StaticCalls, *args: Any) -> Any:
        calls["static"] += 1
        return run(self, *args)

    patch.setattr(StaticCalls, "run", counted)
    if slower is not None:
        due = ChunkTuner.due

        def slowed(self: ChunkTuner, layer: int, group_tokens: int) -> list[int] | None:
            found = due(self, layer, group_tokens)
            return None if found is None else [10 if way == slower else 1 for way in (1, 2)]

        patch.setattr(ChunkTuner, "due", slowed)
    found = []
    for setting in settings:
        calls.clear()
        config = Config(
            model=ModelConfig(path=str(path), max_model_len=64, **(model or {})),
            scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4, max_batch_tokens=24),
            moe=config_from_tree({"model": {"path": "."}, "moe": setting}).moe,
            parallel=ParallelConfig(**parallel),
            runtime=RuntimeConfig(shared_memory=False),
        )
        llm = LLM(config)
        done = llm.generate(PROMPTS, SamplingParams(max_new_tokens=16, logprobs=True))
        loads = llm.model.telemetry.loads.layers
        found.append(
            {
                "done": [(item.token_ids, item.logprobs, item.error) for item in done],
                "loads": {
                    layer: (each.experts.tolist(), each.own_after.tolist(), each.slowest_after)
                    for layer, each in loads.items()
                },
                "static": calls["static"],
                "chosen": [layer.static.choices for layer in llm.model.moe_layers],
            }
        )
        llm.close()
    patch.undo()
    return found


def way(exchange: str, **dispatch: Any) -> dict[str, Any]:
    return {"dispatch": {"exchange": exchange, **dispatch}}


@pytest.mark.parametrize(
    ("family", "world", "parallel"),
    [
        ("mixtral", 1, {}),
        ("mixtral", 2, {}),
        ("olmoe", 3, {}),
        ("deepseek_v2", 4, {"tensor": 2}),
        pytest.param("deepseek_v2", 2, {}, marks=pytest.mark.long),
        pytest.param("olmoe", 4, {"expert": 2}, marks=pytest.mark.long),
    ],
)
def test_every_bit_of_the_completions_and_all_loads_are_those_of_the_counted_way(
    checkpoints, family, world, parallel
):
    settings = [way("counted"), way("static")]
    results = run_ranks(generate, world, checkpoints[family], settings, parallel, timeout=240)
    for counted, static in results:
        assert counted["done"] == static["done"], "to the last bit of every log probability"
        assert counted["loads"] == static["loads"]
        assert not counted["static"] and static["static"]


def test_ranks_keep_what_the_tuner_measures_faster_and_take_it_in_decode_alone(checkpoints):
    for slower, chosen in ((COUNTED, STATIC), (STATIC, COUNTED)):
        args = checkpoints["mixtral"], [way("counted"), way("auto")], {}, slower
        results = run_ranks(generate, 2, *args, timeout=240)
        for counted, auto in results:
            assert counted["done"] == auto["done"]
            assert counted["loads"] == auto["loads"]
            assert auto["chosen"][0] and set(auto["chosen"][0].values()) == {chosen}
        assert results[0][1]["chosen"] == results[1][1]["chosen"]
        assert results[0][1]["static"] == results[1][1]["static"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("mixtral", {"quantization": "int8"}),
        ("mixtral", {"implementation": "transformers"}),
        ("gpt_oss", {}),
        ("longcat_flash", {}),
        ("llama4_text", {}),
        ("qwen2_moe", {"dtype": "bfloat16"}),
    ],
)
def test_experts_and_routers_of_every_form_take_it(family, model, tmp_path):
    make_checkpoint(family, tmp_path, overrides={"vocab_size": 97})
    settings = [way("counted"), way("static")]
    for counted, static in run_ranks(generate, 2, tmp_path, settings, {}, None, model, timeout=240):
        assert counted["done"] == static["done"]
        assert counted["loads"] == static["loads"]
        assert static["static"]


@pytest.mark.long
def test_steps_with_competition_are_counted(checkpoints):
    drop = {"capacity": {"policy": "token_drop", "factor": "1"}}
    both = {"capacity": {**drop["capacity"], "phases": ["prefill", "decode"]}}
    settings = [{**way(name), **each} for each in (drop, both) for name in ("counted", "static")]
    for result in run_ranks(generate, 2, checkpoints["mixtral"], settings, {}, timeout=240):
        for counted, static in (result[:2], result[2:]):
            assert counted["done"] == static["done"]
            assert counted["loads"] == static["loads"]
        assert result[3]["static"] < result[1]["static"]
