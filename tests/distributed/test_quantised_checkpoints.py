"""Quantised checkpoints, end to end: the tokens of their dequantised weights, on any ranks.

python -m pytest tests/distributed/test_quantised_checkpoints.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from engine.config import Config, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from engine.llm import LLM
from engine.request import SamplingParams
from tests.helpers.packers import PACKERS, quantise_checkpoint
from tests.helpers.ranks import run_ranks
from tools.make_random_checkpoint import make_checkpoint

PROMPTS = [[5, 9, 1, 44], [7], [80, 2, 2, 31, 6, 17, 90], [3, 3, 60]]
KINDS = [*PACKERS, "mxfp4"]
UNUSED = ("_shape", "input_scale")  # of no use for dequantised weights, so never read
Outcome = tuple[list[list[int]], list[list[float]], int, dict[str, Any]]


def generate(
    rank: int, path: Path, tensor: int, setting: Any = "dequantize", dtype: Any = "auto"
) -> Outcome:
    """Return tokens, log-probabilities, the bytes of weights read and the resolved settings."""
    config = Config(
        runtime=RuntimeConfig(device="cpu", timeout_s=30.0, threads=1),
        model=ModelConfig(
            path=str(path),
            max_model_len=64,
            quantization=setting,
            dtype=dtype,
        ),
        scheduler=SchedulerConfig(kv_cache_blocks=64, block_size=4),
        parallel=ParallelConfig(tensor=tensor),
    )
    llm = LLM(config)
    try:
        params = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=True)
        done = llm.generate(PROMPTS, params)
        assert llm.weights_report is not None and llm.report is not None
        read, settings = llm.weights_report.bytes_read, llm.report.ranks[rank].resolved_settings
        return [each.token_ids for each in done], [each.logprobs for each in done], read, settings
    finally:
        llm.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source")
    overrides = {"num_experts": 4, "num_attention_heads": 4, "vocab_size": 97}
    make_checkpoint("qwen3_moe", path, overrides=overrides)
    return path


@pytest.fixture(scope="module", params=KINDS)
def pair(request, source, tmp_path_factory) -> tuple[Path, Path]:
    """A quantised checkpoint, and one of its dequantised weights in float32."""
    folder = tmp_path_factory.mktemp(request.param)
    quantise_checkpoint(source, request.param, folder / "quantised", folder / "plain")
    return folder / "quantised", folder / "plain"


def test_tokens_are_those_of_the_dequantised_weights_on_one_rank_and_on_two(pair):
    quantised, plain = pair
    (expected,) = run_ranks(generate, 1, plain, 1)
    (alone,) = run_ranks(generate, 1, quantised, 1)
    assert alone[:2] == expected[:2], "the same bits on the same ranks"
    assert alone[3]["model.quantization"] == "dequantize"
    assert expected[3]["model.quantization"] == "none"
    of_tensor, of_expert = (run_ranks(generate, 2, quantised, tensor) for tensor in (2, 1))
    for each in (*of_tensor, *of_expert):
        assert each[0] == expected[0]
    # Each rank has read its own experts, with their scales, and nothing twice.
    own, header = bytes_of_half(quantised / "model.safetensors")
    for _, _, read, _ in of_expert:
        assert own <= read - header <= 1.02 * own


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
def test_linear_attention_in_fp8_is_read_whole_and_by_key_heads(family, tmp_path):
    source, quantised, plain = (tmp_path / name for name in ("source", "quantised", "plain"))
    make_checkpoint(family, source, overrides={"num_experts": 4, "vocab_size": 97})
    # The first layer is one of linear attention.
    quantise_checkpoint(source, "fp8-block", quantised, plain, unquantised="model.layers.1.")
    with safe_open(quantised / "model.safetensors", "pt") as tensors:
        assert any(re.search(r"linear_attn\.in_proj_qkv.*scale", name) for name in tensors.keys())
    (expected,) = run_ranks(generate, 1, plain, 1)
    (alone,) = run_ranks(generate, 1, quantised, 1)
    assert alone[:2] == expected[:2], "the same bits on the same ranks"
    for each in run_ranks(generate, 2, quantised, 2):
        assert each[0] == expected[0]


def bytes_of_half(file: Path) -> tuple[int, int]:
    """Return the bytes of half of the experts and all else, and those of the header."""
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    experts = others = 0
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():
            num_bytes = 0 if name.endswith(UNUSED) else tensors.get_tensor(name).nbytes
            experts += num_bytes if ".experts." in name else 0
            others += num_bytes if ".experts." not in name else 0
    return others + experts // 2, header


KEPT = ["int4", "int4-zero-point", "awq", "gptq-in-order"]
FLOATS = ["fp8-block", "fp8-ue8m0", "fp8-channel", "fp8-tensor", "mxfp4"]


@pytest.mark.parametrize("kind", [*KEPT, *FLOATS])
def test_kept_weights_are_the_dequantised_ones_up_to_rounding(kind, source, tmp_path):
    quantised, plain = tmp_path / "quantised", tmp_path / "plain"
    quantise_checkpoint(source, kind, quantised, plain)
    (expected,) = run_ranks(generate, 1, plain, 1)
    for setting, name in (("keep", "keep"), ("auto", "keep" if kind in KEPT else "dequantize")):
        (alone,) = run_ranks(generate, 1, quantised, 1, setting)
        assert alone[3]["model.quantization"] == name
        agree(alone, expected)
    own, header = bytes_of_half(quantised / "model.safetensors")
    for each in run_ranks(generate, 2, quantised, 1, "keep"):
        agree(each, expected)
        assert own <= each[2] - header <= 1.02 * own


@pytest.mark.parametrize("setting", ["int8", "int4", "fp8"])
def test_requantised_experts_are_the_same_on_one_rank_and_on_two(setting, source, tmp_path):
    quantise_checkpoint(source, "fp8-block", tmp_path / "quantised", tmp_path / "plain")
    (expected,) = run_ranks(generate, 1, tmp_path / "plain", 1, setting)
    assert expected[3]["model.quantization"] == setting
    assert expected[3]["moe.experts.backend"] == "quantised"
    stacked = tmp_path / "stacked"
    quantise_checkpoint(source, "mxfp4", tmp_path / "mxfp4", stacked)
    (of_stacked,) = run_ranks(generate, 1, stacked, 1, setting)
    for folder, one in (("quantised", expected), ("mxfp4", of_stacked)):
        for ranks, tensor in ((1, 1), (2, 1), (2, 2)):
            for each in run_ranks(generate, ranks, tmp_path / folder, tensor, setting):
                agree(each, one)
    (unrounded,) = run_ranks(generate, 1, tmp_path / "plain", 1)
    assert unrounded[1] != expected[1]


@pytest.mark.parametrize("setting", ["auto", "int8", "int4"])
def test_integers_beside_bfloat16_weights_are_computed_in_float32(setting, source, tmp_path):
    quantise_checkpoint(source, "int4-zero-point", tmp_path / "quantised", tmp_path / "plain")
    (wide,) = run_ranks(generate, 1, tmp_path / "quantised", 1, setting, "float32")
    (alone,) = run_ranks(generate, 1, tmp_path / "quantised", 1, setting, "bfloat16")
    assert alone[3]["model.quantization"] == wide[3]["model.quantization"]
    assert alone[3]["model.dtype"] == "bfloat16 (weights), computes in float32"
    for mine, theirs in zip(alone[1], wide[1], strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=0.05)
    for each in run_ranks(generate, 2, tmp_path / "quantised", 1, setting, "bfloat16"):
        agree(each, alone)


def agree(found: Outcome, expected: Outcome) -> None:
    assert found[0] == expected[0]
    for mine, theirs in zip(found[1], expected[1], strict=True):
        assert mine == pytest.approx(theirs, abs=2e-4)


@pytest.mark.parametrize(
    ("kind", "setting", "words"),
    [
        ("int4-g-idx", "keep", r"'keep': compressed-tensors: model\.layers.*g_idx"),
        ("gptq", "keep", r"'keep': gptq: model\.layers.*g_idx"),
    ],
)
def test_what_is_not_computed_is_refused_in_words(kind, setting, words, source, tmp_path):
    quantise_checkpoint(source, kind, tmp_path / "quantised", tmp_path / "plain")
    (message,) = run_ranks(refusal, 1, tmp_path / "quantised", setting)
    assert re.search(f"model.quantization: {words}", message), message


def test_activation_order_that_config_json_denies_is_refused(source, tmp_path):
    quantise_checkpoint(source, "gptq", tmp_path / "quantised", tmp_path / "plain")
    config = tmp_path / "quantised" / "config.json"
    config.write_text(config.read_text().replace('"desc_act": true', '"desc_act": false'))
    messages = run_ranks(refusal, 2, tmp_path / "quantised", "keep")
    assert "g_idx" in messages[0] and "set model.quantization to dequantize" in messages[0]
    assert messages[0] == messages[1]


def refusal(rank: int, path: Path, setting: str) -> str:
    with pytest.raises(ValueError) as caught:
        generate(rank, path, 1, setting)
    return str(caught.value)
