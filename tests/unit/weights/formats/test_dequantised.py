"""Quantised weights as the loader reads them: against transformers, and against a slow reading.

python -m pytest tests/unit/weights/formats/test_dequantised.py
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.weights import stored_reader
from engine.weights.formats import blocks
from engine.weights.formats.scaled import decode
from engine.weights.loader import CheckpointError, LoadReport, load_weights
from engine.weights.slot import WeightSlot
from tests.helpers import packers
from tests.helpers.packers import CONFIGS, PACKERS, Tensors, slow_mxfp4, slow_read

# Not on the edges of blocks (48 x 40), groups (16) or words (8).
SHARDS = {
    "whole": ((0, 88), (0, 96)),
    "rows": ((13, 61), (0, 96)),
    "columns": ((0, 88), (27, 75)),
    "one column": ((0, 88), (95, 96)),
    "block": ((5, 88), (3, 50)),
}


def save(folder: Path, module: str, stored: Tensors, config: dict[str, Any]) -> None:
    tensors = {f"{module}{suffix}": value.contiguous() for suffix, value in stored.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


def read(
    folder: Path, name: str, shape: tuple[int, ...], shard=None, dtype=torch.float32
) -> tuple[torch.Tensor, LoadReport]:
    bounds = shard or tuple((0, size) for size in shape)
    target = torch.full([stop - start for start, stop in bounds], torch.nan, dtype=dtype)
    slices = tuple(slice(*bound) for bound in bounds)
    return target, load_weights(folder, [WeightSlot(name, target, shape, slices)])


def stored_as(kind: str, rows: int = 88, columns: int = 96) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, columns, generator=generator) * 0.1
    return PACKERS[kind](weight, generator)


@functools.cache
def slow_weight(kind: str) -> torch.Tensor:
    return slow_read(kind, stored_as(kind))


@pytest.fixture(params=[1 << 20, 1])
def piece(request, monkeypatch):
    """Weights in one piece, and in pieces of two lines."""
    monkeypatch.setattr(blocks, "_PIECE_VALUES", request.param)


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("kind", PACKERS)
def test_every_shard_holds_what_a_slow_reading_finds(tmp_path, piece, kind, shard):
    stored = stored_as(kind)
    save(tmp_path, "m.", stored, CONFIGS[kind])
    rows, columns = SHARDS[shard]
    found, _ = read(tmp_path, "m.weight", (88, 96), (rows, columns))
    assert torch.equal(found, slow_weight(kind)[slice(*rows), slice(*columns)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["F32", "F8_E8M0", "U8"])
def test_fp8_blocks_are_those_of_transformers(tmp_path, scale, dtype):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    config = FineGrainedFP8Config(weight_block_size=(32, 16))
    config.scale_fmt = None if scale == "F32" else "ue8m0"

    class Quantizer:
        quantization_config = config

    weight = torch.randn(96, 64) * 0.1
    stored = Fp8Quantize(Quantizer())._quantize_one("m.weight", weight)
    values, scales = stored["m.weight"], stored["m.weight_scale_inv"]
    if scale == "U8":
        scales = scales.view(torch.uint8)
    expected = Fp8Dequantize(Quantizer())._dequantize_one(values, scales, dtype)
    published = {"quant_method": "fp8", "weight_block_size": [32, 16]}
    save(tmp_path, "m.", {"weight": values, "weight_scale_inv": scales}, published)
    found, _ = read(tmp_path, "m.weight", (96, 64), dtype=dtype)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mxfp4_is_that_of_transformers(tmp_path, piece, dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(2)
    stored = {
        "_blocks": torch.randint(0, 256, (3, 10, 2, 16), generator=generator, dtype=torch.uint8),
        "_scales": torch.randint(115, 133, (3, 10, 2), generator=generator, dtype=torch.uint8),
    }
    expected = convert_moe_packed_tensors(stored["_blocks"], stored["_scales"], dtype=dtype)
    save(tmp_path, "experts.down_proj", stored, CONFIGS["mxfp4"])
    found, _ = read(tmp_path, "experts.down_proj", (3, 10, 64), dtype=dtype)
    assert torch.equal(found, expected.transpose(1, 2))


def test_rows_of_gate_and_up_that_alternate_become_gate_before_up(tmp_path, piece):
    stored = packers.mxfp4(torch.randn(4, 12, 64), torch.Generator())
    save(tmp_path, "experts.gate_up_proj", stored, CONFIGS["mxfp4"])
    w13_e2FD = torch.full((2, 12, 64), torch.nan)  # experts 1 and 2
    target = w13_e2FD.unflatten(1, (2, 6)).transpose(1, 2)
    slot = WeightSlot(
        "experts.gate_up_proj", target, (4, 6, 2, 64), (slice(1, 3),), file_shape=(4, 12, 64)
    )
    report = load_weights(tmp_path, [slot])
    expected = slow_mxfp4(stored)[1:3]
    assert torch.equal(w13_e2FD, torch.cat((expected[:, 0::2], expected[:, 1::2]), 1))
    assert report.tensors_read == 1


def test_rows_that_alternate_in_a_tensor_that_is_not_quantised_are_parted_too(tmp_path):
    gate_up = torch.randn(4, 12, 64)
    save_file({"gate_up_proj": gate_up}, tmp_path / "model.safetensors")
    w13_e2FD = torch.full((2, 12, 64), torch.nan)
    target = w13_e2FD.unflatten(1, (2, 6)).transpose(1, 2)
    slot = WeightSlot("gate_up_proj", target, (4, 6, 2, 64), (slice(1, 3),), file_shape=(4, 12, 64))
    load_weights(tmp_path, [slot])
    expected = gate_up[1:3]
    assert torch.equal(w13_e2FD, torch.cat((expected[:, 0::2], expected[:, 1::2]), 1))


@pytest.mark.parametrize("kind", ["int4", "int4-zero-point", "fp8-channel"])
def test_compressed_tensors_is_that_of_its_library(tmp_path, kind):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    stored = stored_as(kind)
    group = CONFIGS[kind]["config_groups"]["group_0"]
    scheme = QuantizationScheme(**group)
    if "weight_scale" in stored:
        stored["weight_scale"] = stored["weight_scale"].bfloat16()
    made = BaseCompressor.get_value_from_registry(group["format"]).decompress(stored, scheme)
    save(tmp_path, "m.", stored, CONFIGS[kind])
    found, _ = read(tmp_path, "m.weight", (88, 96), dtype=torch.bfloat16)
    assert torch.equal(found, made["weight"].bfloat16())


def test_stacked_experts_in_fp8_have_scales_of_their_own(tmp_path, piece):
    parts = [stored_as("fp8-block", 20 + 44, 96) for _ in range(3)]
    for i, part in enumerate(parts):
        part["weight_scale_inv"] = part["weight_scale_inv"] * (i + 1)
    stored = {
        "": torch.stack([part["weight"] for part in parts]),
        "_scale_inv": torch.stack([part["weight_scale_inv"] for part in parts]),
    }
    save(tmp_path, "experts.down_proj", stored, CONFIGS["fp8-block"])
    shard = ((1, 3), (0, 64), (0, 96))
    found, report = read(tmp_path, "experts.down_proj", (3, 64, 96), shard)
    expected = [slow_read("fp8-block", part) for part in parts[1:]]
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("kind", PACKERS)
def test_a_weight_is_read_once_and_no_other_with_it(tmp_path, kind):
    stored = stored_as(kind, 512, 512)
    save(tmp_path, "m.", stored, CONFIGS[kind])
    tensors = {f"{m}.{key}": each.clone() for m in "mn" for key, each in stored.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    target = torch.empty(512, 512)
    other = WeightSlot("n.weight", torch.empty(0, 512), (512, 512), (slice(0, 0),))
    report = load_weights(tmp_path, [WeightSlot("m.weight", target, (512, 512)), other])
    unused = ("input_scale", "weight_shape")
    own = sum(t.nbytes for key, t in stored.items() if key not in unused)
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") + 8
    assert own <= report.bytes_read - header <= 1.02 * own


@pytest.mark.parametrize("kind", PACKERS)
def test_a_weight_is_dequantised_in_pieces_of_a_few_mib(tmp_path, monkeypatch, kind):
    sizes = []

    def check(piece, where, dtype):
        sizes.append(piece.values.numel())

    monkeypatch.setattr(stored_reader, "_check", check)
    save(tmp_path, "m.", stored_as(kind, 640, 2048), CONFIGS[kind])
    read(tmp_path, "m.weight", (640, 2048))
    assert sum(sizes) == 640 * 2048 and max(sizes) <= 1 << 20


def test_a_weight_without_scales_is_read_as_it_is(tmp_path):
    stored = stored_as("fp8-block")
    plain = torch.randn(5, 7)
    tensors = {**{f"m.{key}": each for key, each in stored.items()}, "lm_head.weight": plain}
    save(tmp_path, "", tensors, {**CONFIGS["fp8-block"], "modules_to_not_convert": ["lm_head"]})
    found, target = torch.empty(5, 7), torch.empty(88, 96)
    slots = [WeightSlot("lm_head.weight", found, (5, 7)), WeightSlot("m.weight", target, (88, 96))]
    load_weights(tmp_path, slots)
    assert torch.equal(found, plain)


def test_all_256_codes_of_fp8_are_decoded_as_torch_does():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found, expected = decode(codes), codes.float()
    assert torch.equal(found.isnan(), expected.isnan())
    bits = [each.nan_to_num().view(torch.int32) for each in (found, expected)]
    assert torch.equal(*bits), "the sign of zero too"


# --- What is wrong --------------------------------------------------------------------------------


def problem(folder: Path, shape: tuple[int, ...] = (88, 96), dtype=torch.float32) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder, "m.weight", shape, dtype=dtype)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "part"),
    [("fp8-block", "weight_scale_inv"), ("int4", "weight_scale"), ("awq", "qzeros")],
)
def test_a_part_that_is_missing_is_named(tmp_path, kind, part):
    stored = stored_as(kind)
    del stored[part]
    save(tmp_path, "m.", stored, CONFIGS[kind])
    assert f"m.{part}" in problem(tmp_path)


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("fp8-block", "weight_scale_inv"),
        ("int4", "weight_scale"),
        ("int4-zero-point", "weight_zero_point"),
        ("int4-g-idx", "weight_g_idx"),
        ("awq", "scales"),
        ("gptq", "g_idx"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_named(tmp_path, kind, part):
    stored = stored_as(kind)
    stored[part] = stored[part][:-1]
    save(tmp_path, "m.", stored, CONFIGS[kind])
    text = problem(tmp_path)
    assert "m." in text and part in text and str(list(stored[part].shape)) in text


def test_a_weight_of_another_shape_is_named(tmp_path):
    save(tmp_path, "m.", stored_as("awq"), CONFIGS["awq"])
    assert "m.weight in model.safetensors is [88, 96], must be [96, 88]" in problem(
        tmp_path, (96, 88)
    )


def test_scales_that_are_not_finite_are_found(tmp_path):
    stored = stored_as("fp8-block")
    stored["weight_scale_inv"][1, 1] = torch.nan
    save(tmp_path, "m.", stored, CONFIGS["fp8-block"])
    assert "m.weight (from m.weight, m.weight_scale_inv): holds NaN" in problem(tmp_path)


def test_values_that_the_dtype_cannot_hold_are_found(tmp_path):
    stored = stored_as("fp8-block")
    stored["weight_scale_inv"].fill_(1e6)
    save(tmp_path, "m.", stored, CONFIGS["fp8-block"])
    assert "too large for torch.float16" in problem(tmp_path, dtype=torch.float16)
