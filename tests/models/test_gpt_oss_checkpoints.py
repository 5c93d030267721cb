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

from tests.helpers.model_cases import CASES, Case, make_reference
from tests.helpers.model_harness import chunked, logits_on_this_rank, one_by_one, whole
from tests.helpers.packers import mxfp4
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


def check(path: Path, sequences: list[list[int]], expected: list[torch.Tensor], world: int) -> None:
    schedules = {name: make([len(each) for each in sequences]) for name, make in SCHEDULES.items()}
    found = run_ranks(logits_on_this_rank, world, path, sequences, schedules, {}, NEW_TOKENS)
    for key in found[0]:
        together = {s: logits for rank in found for s, logits in rank[key].items()}
        assert sorted(together) == list(range(len(sequences)))
        for s, logits in together.items():
            wanted = expected[s][-len(logits) :]
            assert (logits - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    case = Case("GptOss", CASES["gpt-oss"].settings | {"hidden_size": 64, "intermediate_size": 32})
    return make_reference(case, tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_mxfp4_gives_the_logits_of_the_weights_that_transformers_dequantises(
    source, tmp_path, world
):
    from transformers import Mxfp4Config

    generator = torch.Generator().manual_seed(3)
    stored = {}
    for name, tensor in load_file(source.path / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            packed = mxfp4(tensor.transpose(1, 2).contiguous(), generator)
            stored |= {f"{name}{suffix}": value for suffix, value in packed.items()}
        else:
            stored[name] = tensor.bfloat16()
    path = write(source.path, tmp_path / "mxfp4", stored, {"quant_method": "mxfp4"})
    sequences = [tokens[:-1] for tokens in source.sequences]
    expected = reference_logits(path, sequences, quantization_config=Mxfp4Config(dequantize=True))
    check(path, sequences, expected, world)


def test_bfloat16_weights_give_the_logits_of_transformers(source, tmp_path):
    tensors = load_file(source.path / "model.safetensors")
    stored = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    path = write(source.path, tmp_path / "bfloat16", stored, None)
    sequences = [tokens[:-1] for tokens in source.sequences]
    check(path, sequences, reference_logits(path, sequences), 2)


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
