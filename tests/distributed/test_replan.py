"""Copies that change while a job runs: weights move, tokens stay, every rank switches together.

Run: pytest tests/distributed/test_replan.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config, CopiesConfig, ModelConfig, MoEConfig, SchedulerConfig
from engine.generation import replanner
from engine.llm import LLM
from engine.moe.copy_weights import copy_parts, read_home
from engine.moe.placement.placement import LayerPlacement, Placement
from engine.moe.placement.placement_file import write_placement
from engine.request import SamplingParams
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

EXPERTS, NEW = 6, 24
PROMPTS = [
    [random.Random(seed).randrange(90) for _ in range(length)]
    for seed, length in enumerate([15, 37, 9, 30, 8, 12, 33, 21])
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("olmoe")
    make_checkpoint("olmoe", path, overrides={"vocab_size": 97, "num_experts": EXPERTS})
    return path


def fail(experts: Any, local: int) -> list[torch.Tensor]:
    raise ValueError("the weights are not finite")


def generate(
    rank: int,
    path: Path,
    file: str,
    replan: int | str,
    row_bytes: int,
    failing: int = -1,
    quantization: str = "auto",
) -> dict[str, Any]:
    replanner._ROW_BYTES = row_bytes
    if rank == failing:
        replanner.read_home = fail
    config = Config(
        model=ModelConfig(path=str(path), max_model_len=64, quantization=quantization),  # pyright: ignore
        scheduler=SchedulerConfig(kv_cache_blocks=128, block_size=4, max_sequences=2),
        moe=MoEConfig(placement=file, copies=CopiesConfig(replan=replan, target=1.0)),
    )
    llm = LLM(config)
    changes: list[dict[str, Any]] = []
    llm.on_replan = changes.append
    done = llm.generate(PROMPTS, SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    assert llm.report is not None
    held = {}
    for layer in llm.model.moe_layers:
        first = layer.experts.num_homes
        for place, expert in enumerate(layer.local_experts[first:]):
            parts = copy_parts(layer.experts, place)
            held[layer.layer, expert] = [part.clone() for part in parts]
        for local, expert in enumerate(layer.local_experts[:first]):
            held[layer.layer, f"home {expert}"] = [
                part.clone() for part in read_home(layer.experts, local)
            ]
    placement = llm.model.placement
    rows = [each.expert_rows for each in llm.report.ranks]
    loads = [sum(layer.expert_loads_after) for layer in llm.report.layers]
    llm.close()
    return {
        "tokens": [item.token_ids for item in done],
        "changes": changes,
        "held": held,
        "placement": placement,
        "rows": rows,
        "loads": loads,
    }


@pytest.mark.parametrize(
    ("precision", "world", "row_bytes", "quantization"),
    [
        ("model", 2, 1 << 20, "auto"),
        ("model", 3, 1000, "auto"),
        ("int4", 2, 999, "auto"),
        ("int8", 2, 999, "int8"),  # copies are what homes are
        ("int4", 2, 1 << 20, "int8"),
    ],
)
def test_copies_follow_the_loads_and_hold_their_experts_weights(
    precision, world, row_bytes, quantization, checkpoint, tmp_path
):
    homes = tuple(expert * world // EXPERTS for expert in range(EXPERTS))
    # Each rank holds a copy of every expert in turn, whichever is cold is of no use.
    copies: list[list[int]] = [[] for _ in range(EXPERTS)]
    copies[0].append(world - 1)
    copies[EXPERTS - 1].append(0)
    layer = LayerPlacement(homes, tuple(map(tuple, copies)))
    start = Placement(world, EXPERTS, {0: layer, 1: layer}, precision)
    write_placement(start, tmp_path / "p.yaml")
    args = (checkpoint, str(tmp_path / "p.yaml"))
    stays = run_ranks(generate, world, *args, "off", row_bytes, -1, quantization, timeout=120)
    moves = run_ranks(generate, world, *args, 2, row_bytes, -1, quantization, timeout=120)
    assert stays[0]["placement"] == start and not stays[0]["changes"]
    changed = moves[0]["placement"]
    assert moves[0]["changes"], "nothing has moved"
    assert not any(result["changes"] for result in moves[1:]), "only the first rank notes changes"
    assert changed != start
    for result in moves:
        assert result["placement"] == changed
        assert result["loads"] == moves[0]["loads"]
        assert sum(result["rows"]) == sum(result["loads"])
        if precision in ("model", quantization):
            assert result["tokens"] == stays[0]["tokens"]
    home_of = {
        key: parts
        for result in moves
        for key, parts in result["held"].items()
        if isinstance(key[1], str)
    }
    found = 0
    for rank, result in enumerate(moves):
        for (index, expert), parts in result["held"].items():
            if isinstance(expert, str):
                continue
            found += 1
            assert rank in changed.layer(index).copies_E[expert]
            for part, of_home in zip(parts, home_of[index, f"home {expert}"], strict=True):
                assert torch.equal(part, of_home), (rank, index, expert)
    assert found == changed.num_copies == start.num_copies


def test_a_rank_that_cannot_prepare_weights_leaves_the_copies_and_the_job_as_they_are(
    checkpoint, tmp_path
):
    layer = LayerPlacement((0, 0, 0, 1, 1, 1), ((1,), (), (), (), (), (0,)))
    start = Placement(2, EXPERTS, {0: layer, 1: layer})
    write_placement(start, tmp_path / "p.yaml")
    for failing in range(2):
        args = (checkpoint, str(tmp_path / "p.yaml"), 2, 1 << 20, failing)
        results = run_ranks(generate, 2, *args, timeout=120)
        assert results[0]["tokens"] == results[1]["tokens"]
        assert results[0]["placement"] == results[1]["placement"]
        moved = {move["source"] for change in results[0]["changes"] for move in change["moves"]}
        assert failing not in moved
