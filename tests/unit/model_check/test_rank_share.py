"""What a rank holds by the model check, against what a rank of the engine allocates.

Run: pytest tests/unit/model_check/test_rank_share.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import pytest
import torch
from torch import nn

from engine import model_check
from engine.config import Config, ModelConfig, ParallelConfig, RuntimeConfig
from engine.distributed.groups import Group, Topology
from engine.generation.builder import build
from engine.model_check import report
from engine.model_check.text import lines_of
from engine.models.decoder import CausalLM
from engine.models.registry import read_config
from tests.helpers.model_cases import CASES
from tests.helpers.sparse_checkpoint import deepseek_v3, olmoe_7b, write_sparse

GIB = 1 << 30


def model_of(folder: Path, dtype: torch.dtype, ranks: int, tensor: int, held: str) -> CausalLM:
    """What the engine builds on rank 0 of a run that never communicates."""

    def group(size: int) -> Group:
        return Group(0, size, tuple(range(size)), cast(Any, None))

    topology = Topology(
        world=group(ranks),
        expert=group(ranks),
        tensor=group(tensor),
        control=group(ranks),
        counts=group(ranks),
        host_world=group(ranks),
        host_tensor=group(tensor),
        data_rank=0,
        num_data=ranks // tensor,
        replica=0,
        device=torch.device("cpu"),
        store=cast(Any, None),
        local_world_size=ranks,
        host="here",
    )
    config = Config(
        model=ModelConfig(path=str(folder), quantization=cast(Any, held), load_format="dummy"),
        parallel=ParallelConfig(tensor=tensor),
        runtime=RuntimeConfig(device="cpu"),
    )
    return build(config, read_config(folder), topology, dtype)


def allocated(model: CausalLM) -> int:
    """Bytes of all tensors that the model's parts have, but the rotary table."""
    found: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, nn.Module):
            for each in (*value._parameters.values(), *value._buffers.values()):
                walk(each)
            for name, each in value._modules.items():
                walk(None if name == "rotary" else each)
            for name in ("low_bit", "low_bit_copies"):
                walk(getattr(value, name, None))
        elif hasattr(value, "bytes_per_expert"):
            for each in vars(value).values():
                walk(each)
        elif hasattr(value, "packed_ePCN"):
            walk((value.packed_ePCN, value.scale_ePGN))
        elif isinstance(value, tuple):
            for each in value:
                walk(each)

    walk(model)
    return sum(found.values())


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("case", ["mixtral", "qwen2-moe", "deepseek-v3", "gpt-oss", "olmoe"])
def test_a_rank_of_the_engine_allocates_what_is_told(tmp_path, case, ranks):
    settings = CASES[case].config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for dtype, held in (("float32", "auto"), ("float16", "dequantize")):
        found = report.check(tmp_path, (ranks,), 1, dtype, (79.0,), held)["ranks"][0]
        model = model_of(tmp_path, getattr(torch, dtype), ranks, 1, held)
        assert found["bytes"]["total"] == allocated(model), (dtype, held)
        block = model.kv_spec.bytes_per_block(16, model.dtype)
        assert 16 * found["kv_bytes_per_token"] == block


@pytest.mark.parametrize("held", ["int8", "int4"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_low_bit_experts_take_what_is_told(tmp_path, held, ranks):
    (tmp_path / "config.json").write_text(json.dumps(CASES["mixtral"].config().to_dict()))
    found = report.check(tmp_path, (ranks,), 1, "float32", (79.0,), held)
    assert found["held"] == {"setting": held, "as": held}
    model = model_of(tmp_path, torch.float32, ranks, 1, held)
    assert found["ranks"][0]["bytes"]["total"] == allocated(model)


def test_tensor_ranks_allocate_what_is_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CASES["mixtral"].config().to_dict()))
    found = report.check(tmp_path, (2,), 2, "float32", (79.0,))["ranks"][0]
    model = model_of(tmp_path, torch.float32, 2, 2, "auto")
    assert found["bytes"]["total"] == allocated(model)


def test_integers_and_a_scale_per_32_of_them_are_what_experts_take(tmp_path):
    folder = write_sparse(tmp_path, *olmoe_7b())
    plain, int8, int4 = (
        report.check(folder, (4,), 1, "auto", (79.0,), held)["ranks"][0]["bytes"]
        for held in ("auto", "int8", "int4")
    )
    weights = 16 * 16 * 3 * 2048 * 1024
    assert plain["experts"] == 2 * weights
    assert int8["experts"] == weights + 4 * weights // 32
    assert int4["experts"] == weights // 2 + 4 * weights // 32
    for part in ("attention", "router", "embedding, head", "norms"):
        assert plain[part] == int8[part] == int4[part]


def test_what_the_engine_refuses_to_hold_is_refused_and_sizes_are_those_of_the_dtype(tmp_path):
    config, tensors = olmoe_7b()
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    folder = write_sparse(tmp_path, config, tensors)  # whose experts are in bfloat16
    plain = report.check(folder, (4,), 1, "auto", (79.0,), "dequantize")
    assert plain["runs"] and plain["held"]["as"] == "dequantize"
    refused = report.check(folder, (4,), 1, "auto", (79.0,), "keep")
    assert not refused["runs"] and refused["held"] == {"setting": "keep", "as": None}
    assert len(refused["problems"]) == 1
    assert refused["problems"][0].startswith("model.quantization: 'keep': fp8")
    assert refused["ranks"] == plain["ranks"]
    assert "held        refused, see above" in "\n".join(lines_of(refused))


def test_without_the_files_it_is_told_that_a_format_may_be_kept(tmp_path):
    config, _ = deepseek_v3(fp8=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = "\n".join(lines_of(report.check(tmp_path, (8,), 1, "auto", (139.0,))))
    assert "what could be kept as it is only the files' headers tell" in text
    assert "as stored" not in text


def test_int4_experts_make_deepseek_v3_fit_where_bfloat16_does_not(tmp_path):
    config, tensors = deepseek_v3(fp8=True, layers=61)
    names = [name for name in tensors if ".experts." not in name or ".experts.0." in name]
    folder = write_sparse(tmp_path, config, {name: tensors[name] for name in names})
    wide, narrow = (
        report.check(folder, (8,), 1, "auto", (139.0,), held) for held in ("dequantize", "int4")
    )
    assert wide["ranks"][0]["kv_tokens"] == {"139": 0} != narrow["ranks"][0]["kv_tokens"]
    text = "\n".join(lines_of(wide))
    assert "fits on none of these; try more --ranks or --quantization int4" in text
    assert "in bfloat16, dequantised as they are read (model.quantization dequantize)" in text
    assert "experts in int4, made from their values; all else in bfloat16" in "\n".join(
        lines_of(narrow)
    )


def test_the_choices_of_the_command_are_those_of_the_setting():
    hints = get_type_hints(ModelConfig)
    assert set(model_check._QUANTIZATIONS) == set(get_args(hints["quantization"]))
    assert set(model_check._DTYPES) == set(get_args(hints["dtype"]))


def test_a_config_without_a_dtype_is_told_since_auto_is_float32_then(tmp_path):
    config, tensors = olmoe_7b()
    del config["torch_dtype"]
    folder = write_sparse(tmp_path, config, tensors)
    found = report.check(folder, (1,), 1, "auto", (79.0,))
    assert found["dtype"] == "float32" and "names no torch_dtype" in found["remarks"][0]
    found = report.check(folder, (1,), 1, "bfloat16", (79.0,))
    assert not any("torch_dtype" in remark for remark in found["remarks"])


def test_sizes_of_small_models_are_in_mib(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CASES["mixtral"].config().to_dict()))
    assert "per rank, in MiB" in "\n".join(
        lines_of(report.check(tmp_path, (1,), 1, "auto", (1.0,)))
    )
