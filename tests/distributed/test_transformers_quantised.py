"""Quantised checkpoints of models that transformers builds: tokens of the dequantised weights.

Run: pytest tests/distributed/test_transformers_quantised.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config, ModelConfig, RuntimeConfig, SchedulerConfig
from engine.llm import LLM
from engine.request import SamplingParams
from tests.helpers.model_cases import CASES, make_reference
from tests.helpers.packers import quantise_checkpoint
from tests.helpers.ranks import run_ranks
from tests.helpers.transformers_cases import FOREIGN_CASES

PROMPTS = [[5, 9, 1, 44], [7], [80, 2, 2, 31, 6, 17, 90], [3, 3, 60]]
OWN = ("mixtral", "qwen2-moe", "glm4-moe")  # families that both implementations have
FOREIGN = ("dots1", "phimoe")
KINDS = ("fp8-block", "int4", "awq")
Outcome = tuple[list[list[int]], list[list[float]], dict[str, Any]]


def generate(rank: int, path: Path, implementation: Any, quantization: Any) -> Outcome:
    """Return tokens, their log-probabilities and the resolved settings."""
    config = Config(
        runtime=RuntimeConfig(device="cpu", timeout_s=30.0, threads=1),
        model=ModelConfig(
            path=str(path),
            max_model_len=64,
            implementation=implementation,
            quantization=quantization,
            dtype="float32",
        ),
        scheduler=SchedulerConfig(kv_cache_blocks=64, block_size=4),
    )
    llm = LLM(config)
    try:
        params = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=True)
        done = llm.generate(PROMPTS, params)
        assert llm.report is not None
        settings = llm.report.ranks[rank].resolved_settings
        return [each.token_ids for each in done], [each.logprobs for each in done], settings
    finally:
        llm.close()


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    @cache
    def source(case: str) -> Path:
        path = tmp_path_factory.mktemp("source")
        made = (CASES | FOREIGN_CASES)[case]
        # Whole groups and words of the packed formats.
        sizes = {name: 32 for name in made.settings if name.endswith("intermediate_size")}
        return make_reference(replace(made, settings=made.settings | sizes), path).path

    @cache
    def pair(case: str, kind: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(kind)
        quantise_checkpoint(source(case), kind, folder / "quantised", folder / "plain")
        return folder / "quantised", folder / "plain"

    return pair


def agree(found: Outcome, expected: Outcome) -> None:
    assert found[0] == expected[0]
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert mine == pytest.approx(theirs, abs=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", (*OWN, *FOREIGN))
def test_tokens_are_those_of_the_dequantised_weights(case: str, kind: str, quantised: Any) -> None:
    file, plain = quantised(case, kind)
    (expected,) = run_ranks(generate, 1, plain, "transformers", "auto")
    assert expected[2]["model.quantization"] == "none"
    for ranks in (1, 2):
        for each in run_ranks(generate, ranks, file, "transformers", "dequantize"):
            assert each[2]["model.quantization"] == "dequantize"
            agree(each, expected)
    (kept,) = run_ranks(generate, 1, file, "transformers", "keep")
    assert kept[2]["model.quantization"] == "keep"
    agree(kept, expected)
    if case in OWN:
        (ours,) = run_ranks(generate, 1, file, "lockstep", "dequantize")
        agree(ours, expected)


@pytest.mark.long
@pytest.mark.parametrize("setting", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("case", ("mixtral", "dots1"))
def test_requantised_experts_are_the_same_on_one_rank_and_on_two(
    case: str, setting: str, quantised: Any
) -> None:
    file, plain = quantised(case, "fp8-block")
    (expected,) = run_ranks(generate, 1, plain, "transformers", setting)
    assert expected[2]["model.quantization"] == setting
    for ranks in (1, 2):
        for each in run_ranks(generate, ranks, file, "transformers", setting):
            agree(each, expected)
    if case in OWN:
        (ours,) = run_ranks(generate, 1, file, "lockstep", setting)
        agree(ours, expected)
