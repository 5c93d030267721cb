"""gpt-oss as it is published: experts in MXFP4 and everything in bfloat16, against transformers.

python -m pytest tests/models/test_gpt_oss_checkpoints.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.ops.quantised_rows import FloatLayout, IntegerLayout, round_to
from tests.helpers.model_cases import CASES, Case, make_reference
from tests.helpers.model_harness import chunked, logits_on_this_rank, one_by_one, whole
from tests.helpers.packers import mxfp4, slow_mxfp4
from tests.helpers.ranks import run_ranks

NEW_TOKENS = 5
SCHEDULES = {"whole": whole, "chunked": chunked, "one by one": one_by_one}


def reference_logits(path: Path, sequences: list[list[int]], **load: Any) -> list[torch.Tensor]:
    """Logits that transformers computes from a checkpoint in float32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **load
    )
    assert type(model).__name__ == "GptOssForCausalLM"
    model.float().eval()
    with torch.inference_mode():
        return [model(torch.tensor([each]), use_cache=False).logits[0] for each in sequences]


def worst_error(
    path: Path,
    sequences: list[list[int]],
    expected: list[torch.Tensor],
    world: int,
    quantization: str = "dequantize",
) -> float:
    """Largest difference of the logits, of the largest expected one."""
    schedules = {name: make([len(each) for each in sequences]) for name, make in SCHEDULES.items()}
    given = (path, sequences, schedules, {}, NEW_TOKENS, torch.float32, quantization)
    found, worst = run_ranks(logits_on_this_rank, world, *given), 0.0
    for key in found[0]:
        together = {s: logits for rank in found for s, logits in rank[key].items()}
        assert sorted(together) == list(range(len(sequences)))
        for s, logits in together.items():
            wanted = expected[s][-len(logits) :]
            worst = max(worst, float((logits - wanted).abs().max() / wanted.abs().max()))
    return worst


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    case = Case("GptOss", CASES["gpt-oss"].settings | {"hidden_size": 64, "intermediate_size": 32})
    return make_reference(case, tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def published(source, tmp_path_factory) -> Path:
    """The source's weights as gpt-oss is published."""
    generator = torch.Generator().manual_seed(3)
    stored = {}
    for name, tensor in load_file(source.path / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            packed = mxfp4(tensor.transpose(1, 2).contiguous(), generator)
            stored |= {f"{name}{suffix}": value for suffix, value in packed.items()}
        else:
            stored[name] = tensor.bfloat16()
    out = tmp_path_factory.mktemp("published") / "mxfp4"
    return write(source.path, out, stored, {"quant_method": "mxfp4"})


@pytest.fixture(scope="module")
def expected(source, published) -> list[torch.Tensor]:
    """Logits of the weights that transformers dequantises."""
    from transformers import Mxfp4Config

    sequences = [tokens[:-1] for tokens in source.sequences]
    return reference_logits(published, sequences, quantization_config=Mxfp4Config(dequantize=True))


@pytest.mark.parametrize(
    ("setting", "world"), [("dequantize", 1), ("dequantize", 2), ("dequantize", 3), ("keep", 2)]
)
def test_mxfp4_gives_the_logits_of_the_weights_that_transformers_dequantises(
    source, published, expected, setting, world
):
    sequences = [tokens[:-1] for tokens in source.sequences]
    assert worst_error(published, sequences, expected, world, setting) < 2e-5


@pytest.mark.parametrize("setting", ["int8", "fp8"])
def test_experts_with_biases_and_a_limit_are_rounded_anew(source, published, tmp_path, setting):
    layout = FloatLayout("fp8", (128, 128)) if setting == "fp8" else IntegerLayout(8, 32)
    rounded = load_file(published / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in rounded if name.endswith("_blocks")]:
        parts = {f"_{part}": rounded.pop(f"{name}_{part}") for part in ("blocks", "scales")}
        values = slow_mxfp4(parts)
        stride = 2 if name.endswith("gate_up_proj") else 1  # gate and up alternate, blocks do not
        for expert in values:
            for first in range(stride):
                half_OI = round_to(expert[None, first::stride], layout)
                expert[first::stride] = half_OI.dequantised(0, torch.float32)
        rounded[name] = values.transpose(1, 2).contiguous()
    path = write(source.path, tmp_path / "rounded", rounded, None)
    sequences = [tokens[:-1] for tokens in source.sequences]
    expected = reference_logits(path, sequences)
    assert worst_error(published, sequences, expected, 2, setting) < 2e-5


def test_bfloat16_weights_give_the_logits_of_transformers(source, tmp_path):
    tensors = load_file(source.path / "model.safetensors")
    stored = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    path = write(source.path, tmp_path / "bfloat16", stored, None)
    sequences = [tokens[:-1] for tokens in source.sequences]
    assert worst_error(path, sequences, reference_logits(path, sequences), 2) < 2e-5


def write(
    source: Path, out: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None
) -> Path:
    """Write a checkpoint of other tensors beside the source's config.json."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    if quantization is not None:
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return out
