"""Quantised files of families that transformers builds give the weights that they stand for.

python -m pytest tests/models/test_transformers_quantised.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.distributed import bootstrap
from engine.distributed.groups import Topology
from engine.models.transformers_model.model import TransformersModel
from tests.helpers.model_cases import CASES, Case, make_reference
from tests.helpers.model_harness import load_model, make_config
from tests.helpers.packers import CONFIGS, mxfp4, quantise_checkpoint, slow_mxfp4
from tests.helpers.transformers_cases import FOREIGN_CASES


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Topology]:
    topology = bootstrap.start(make_config(Path("unused")), {})
    yield topology
    bootstrap.stop(topology)


def weights_of(path: Path, one_rank: Topology) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint as the model holds it."""
    model = load_model(make_config(path, implementation="transformers"), one_rank)
    assert isinstance(model, TransformersModel)
    found = {
        name: tensor.float()
        for name, tensor in model.causal.state_dict().items()
        if ".experts." not in name
    }
    for layer, moe in enumerate(model.moe_layers):
        for number, tensor in enumerate(moe.experts.stacked.tensors):
            found[f"experts of layer {layer}, {number}"] = tensor.float()
    return found


def write(source: Path, out: Path, tensors: dict[str, torch.Tensor], quantization: Any) -> None:
    """Write a checkpoint of other tensors beside the source's configuration."""
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    config |= {} if quantization is None else {"quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def widened(name: str, **settings: Any) -> Case:
    return Case(FOREIGN_CASES[name].family, FOREIGN_CASES[name].settings | settings)


# Of Phi-MoE the mapping renames w1, w2 and w3 and joins them; of Solar Open it joins alone.
@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (FOREIGN_CASES["phimoe"], "fp8-block"),
        (FOREIGN_CASES["solar-open"], "fp8-channel"),
        (widened("phimoe", intermediate_size=48), "int4"),
        (widened("solar-open", moe_intermediate_size=48, intermediate_size=48), "int4-zero-point"),
    ],
    ids=["fp8", "compressed fp8", "compressed int4", "compressed int4, zero points"],
)
def test_scales_are_found_under_the_names_that_the_mapping_renames(
    case: Case, kind: str, tmp_path: Path, one_rank: Topology
) -> None:
    source = make_reference(case, tmp_path / "source").path
    quantise_checkpoint(source, kind, tmp_path / "stored", tmp_path / "plain")
    stored = load_file(tmp_path / "stored" / "model.safetensors")
    assert any(".experts." in name and "scale" in name for name in stored)
    found, wanted = (weights_of(tmp_path / name, one_rank) for name in ("stored", "plain"))
    original = weights_of(source, one_rank)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name
    assert any(not torch.equal(found[name], original[name]) for name in found if "experts" in name)


def test_mxfp4_experts_are_turned_only_where_the_files_have_them_turned(
    tmp_path: Path, one_rank: Topology
) -> None:
    settings = CASES["gpt-oss"].settings | {"hidden_size": 64, "intermediate_size": 32}
    source = make_reference(Case("GptOss", settings), tmp_path / "source").path
    generator, stored, plain = torch.Generator().manual_seed(3), {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            packed = mxfp4(tensor.transpose(1, 2).contiguous(), generator)
            stored |= {f"{name}{suffix}": value for suffix, value in packed.items()}
            plain[name] = slow_mxfp4(packed).transpose(1, 2).contiguous()
        else:
            stored[name] = plain[name] = tensor
    write(source, tmp_path / "stored", stored, CONFIGS["mxfp4"])
    write(source, tmp_path / "plain", plain, None)
    found, wanted = (weights_of(tmp_path / name, one_rank) for name in ("stored", "plain"))
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name
