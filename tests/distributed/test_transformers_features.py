"""What LLM.generate offers, of models that transformers builds: the same answers as plain runs.

Run: pytest tests/distributed/test_transformers_features.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config.loader import config_from_tree
from engine.llm import LLM
from engine.moe.placement.placement import LayerPlacement, Placement
from engine.moe.placement.placement_file import write_placement
from engine.request import SamplingParams
from tests.helpers.model_cases import make_reference
from tests.helpers.ranks import run_ranks
from tests.helpers.transformers_cases import FOREIGN_CASES

EXPERTS = 5
PREFIX = list(range(20, 36))  # four blocks
PROMPTS = [[*PREFIX, *range(own, own + 5)] for own in (50, 60, 70, 80)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reference(FOREIGN_CASES["granitemoe"], tmp_path_factory.mktemp("made")).path


def generate(rank: int, path: Path, tree: dict[str, Any], sampling: dict[str, Any]) -> list[Any]:
    """Return the records of the prompts, run twice: the second time prefixes may be cached."""
    common = {
        "model": {"path": str(path), "max_model_len": 64, "dtype": "float32"},
        "scheduler": {"kv_cache_blocks": 64, "block_size": 4},
        "runtime": {"device": "cpu", "threads": 1, "timeout_s": 30.0},
    }
    for section, values in tree.items():
        common[section] = {**common.get(section, {}), **values}
    llm = LLM(config_from_tree(common))
    try:
        params = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=True, **sampling)
        llm.generate(PROMPTS, params)
        return [each.record() for each in llm.generate(PROMPTS, params)]
    finally:
        llm.close()


def run(path: Path, ranks: int = 2, tree: dict[str, Any] | None = None, **sampling: Any) -> Any:
    return run_ranks(generate, ranks, path, tree or {}, sampling, timeout=120)[0]


def same(found: list[Any], expected: list[Any], names: tuple[str, ...] = ("logprobs",)) -> None:
    assert [each["token_ids"] for each in found] == [each["token_ids"] for each in expected]
    for name in names:
        for mine, theirs in zip(found, expected, strict=True):
            assert mine[name][1:] == pytest.approx(theirs[name][1:], abs=1e-4)


NO_CACHE = {"scheduler": {"prefix_cache": False}}


@pytest.mark.long
def test_cached_prefixes_and_prompt_logprobs_are_those_of_prompts_run_whole(
    checkpoint: Path,
) -> None:
    whole = run(checkpoint, 1, NO_CACHE, prompt_logprobs=True)
    assert all(len(each["prompt_logprobs"]) == len(PROMPTS[0]) for each in whole)
    same(
        run(checkpoint, 2, NO_CACHE, prompt_logprobs=True),
        whole,
        ("logprobs", "prompt_logprobs"),
    )
    cached = run(checkpoint)
    same(cached, whole)
    assert sum(each["usage"].get("cached_tokens", 0) for each in cached) >= len(PREFIX)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["model", "int8"])
def test_placed_experts_and_copies_compute_the_same_model(
    checkpoint: Path, tmp_path: Path, precision: Any
) -> None:
    plain = run(checkpoint, 2, NO_CACHE)
    layer = LayerPlacement((0, 1, 1, 0, 1), ((1,), (0,), (0,), (1,), (0,)))
    write_placement(
        Placement(2, EXPERTS, dict.fromkeys(range(2), layer), precision), tmp_path / "p.yaml"
    )
    moe: dict[str, Any] = {"placement": str(tmp_path / "p.yaml")}
    if precision == "int8":  # copies take rows that they round
        moe["copies"] = {"target": 1.0}
    placed = run(checkpoint, 2, {**NO_CACHE, "moe": moe})
    if precision == "model":
        same(placed, plain)
    else:
        assert sum(each["capacity"]["copied"] for each in placed) > 0
        for mine, theirs in zip(placed, plain, strict=True):
            assert mine["logprobs"][0] == pytest.approx(theirs["logprobs"][0], abs=0.05)


@pytest.mark.long
def test_several_completions_and_likeliest_tokens_are_the_same_on_one_rank_and_on_two(
    checkpoint: Path,
) -> None:
    asked = {"temperature": 0.8, "n": 2, "seed": 3, "top_logprobs": 2, "frequency_penalty": 0.5}
    one, two = (run(checkpoint, ranks, NO_CACHE, **asked) for ranks in (1, 2))
    for mine, theirs in zip(two, one, strict=True):
        assert len(mine["choices"]) == 2
        tokens = [[choice["token_ids"] for choice in each["choices"]] for each in (mine, theirs)]
        assert tokens[0] == tokens[1]
