"""engine/generation/quantization.py: how weights are held, by setting, checkpoint and device."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import Config, ExpertsConfig, ModelConfig, MoEConfig
from engine.generation import quantization
from engine.generation.quantization import Held, resolve_quantization
from engine.models.registry import read_config, read_spec
from engine.moe.low_bit_experts import ExpertLayouts
from engine.ops import triton_support
from engine.ops.quantised_rows import FloatLayout, IntegerLayout
from tests.helpers.fake_deep_gemm import fake_module
from tests.helpers.packers import BLOCK, GROUP, quantise_checkpoint
from tools.make_random_checkpoint import make_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    make_checkpoint("qwen3_moe", root / "none", overrides={"num_experts": 4, "vocab_size": 97})
    kinds = ("int4", "int4-g-idx", "awq", "mxfp4", "fp8-block", "fp8-channel", "fp8-tensor")
    for kind in kinds:
        quantise_checkpoint(root / "none", kind, root / kind, root / f"{kind}-plain")
    wide = {"num_experts": 2, "vocab_size": 97, "hidden_size": 128, "moe_intermediate_size": 128}
    make_checkpoint("qwen3_moe", root / "wide", overrides=wide)
    quantise_checkpoint(root / "wide", "fp8-128", root / "fp8-128", root / "fp8-128-plain")
    return {each.name: each for each in root.iterdir()}


def resolved(
    folder: Path,
    setting: str,
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    load_format: str = "safetensors",
) -> Held:
    model = ModelConfig(path=str(folder), quantization=setting, load_format=load_format)  # pyright: ignore
    config = Config(model=model, moe=MoEConfig(experts=ExpertsConfig(backend=backend)))  # pyright: ignore
    return resolve_quantization(config, read_spec(read_config(folder)), device, dtype)


def test_what_is_not_quantised_is_as_it_is_unless_few_bits_are_asked_for(folders):
    for setting in ("auto", "dequantize", "keep"):
        assert resolved(folders["none"], setting) == Held("none")
        assert resolved(folders["int4"], setting, load_format="dummy") == Held("none")
    fp8 = FloatLayout("fp8", (128, 128))
    for setting, made in (
        ("int8", ExpertLayouts.of_bits(8, 32)),
        ("int4", ExpertLayouts.of_bits(4, 32)),
        ("fp8", ExpertLayouts(fp8, fp8)),
    ):
        layouts = dict.fromkeys(range(2), made)
        for folder in ("none", "int4", "mxfp4"):
            assert resolved(folders[folder], setting) == Held(setting, layouts)


def test_integers_are_kept_with_their_groups_and_zero_points(folders):
    for kind, has_zero in (("int4", False), ("awq", True)):
        layout = IntegerLayout(4, GROUP, has_zero)
        layouts = dict.fromkeys(range(2), ExpertLayouts(layout, layout, kept=True))
        assert resolved(folders[kind], "keep") == Held("keep", layouts)
        assert resolved(folders[kind], "dequantize") == Held("dequantize")


@pytest.mark.parametrize(
    ("kind", "up", "down"),
    [
        ("mxfp4", FloatLayout("mxfp4"), FloatLayout("mxfp4")),
        ("fp8-block", FloatLayout("fp8", BLOCK), FloatLayout("fp8", BLOCK)),
        ("fp8-channel", FloatLayout("fp8", (1, 64)), FloatLayout("fp8", (1, 64))),
        ("fp8-tensor", FloatLayout("fp8", (64, 64)), FloatLayout("fp8", (64, 64))),
    ],
)
def test_small_floats_are_kept_with_their_blocks(kind, up, down, folders, monkeypatch):
    kept = Held("keep", dict.fromkeys(range(2), ExpertLayouts(up, down, kept=True)))
    assert resolved(folders[kind], "keep") == kept
    monkeypatch.setattr(triton_support, "_installed", lambda: True)
    assert resolved(folders[kind], "auto", device=CUDA, dtype=torch.bfloat16) == kept


def test_auto_keeps_what_a_compiled_kernel_computes_on(folders, monkeypatch):
    monkeypatch.setattr(quantization.native, "available", lambda: True)
    assert resolved(folders["int4"], "auto").name == "keep"
    for kind in ("int4-g-idx", "mxfp4", "fp8-block"):
        assert resolved(folders[kind], "auto") == Held("dequantize")
    assert resolved(folders["int4"], "auto", dtype=torch.bfloat16) == Held("dequantize")
    assert resolved(folders["int4"], "auto", backend="grouped_mm") == Held("dequantize")
    monkeypatch.setattr(quantization.native, "available", lambda: False)
    assert resolved(folders["int4"], "auto") == Held("dequantize")
    for installed, name in ((True, "keep"), (False, "dequantize")):
        monkeypatch.setattr(triton_support, "_installed", lambda installed=installed: installed)
        assert resolved(folders["int4"], "auto", device=CUDA).name == name
        assert resolved(folders["int4-g-idx"], "auto", device=CUDA) == Held("dequantize")


@pytest.mark.parametrize("setting", ["int8", "int4", "fp8", "keep"])
@pytest.mark.parametrize("backend", ["te", "grouped_mm"])
def test_backends_of_other_weights_are_refused(backend, setting, folders):
    with pytest.raises(ValueError, match=f"moe.experts.backend: '{backend}'.*{setting}.*to auto"):
        resolved(folders["int4"], setting, backend=backend)


def test_what_cannot_be_kept_is_refused_with_what_to_set(folders):
    words = "'keep': compressed-tensors: .*g_idx.*are kept"
    with pytest.raises(ValueError, match=f"model.quantization: {words}.*set model.quantization to"):
        resolved(folders["int4-g-idx"], "keep")


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that torch has the scaled grouped product for."""
    monkeypatch.setattr(triton_support, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def scaled(folder: Path, setting: str, **more) -> Held:
    options = {"device": CUDA, "dtype": torch.bfloat16, **more}
    return resolved(folder, setting, backend="scaled_mm", **options)


@pytest.mark.usefixtures("hopper")
def test_scaled_mm_takes_fp8_row_by_row_made_or_stored(folders):
    made = dict.fromkeys(range(2), ExpertLayouts.of_fp8_rows())
    for kind in ("none", "int4", "fp8-block"):
        assert scaled(folders[kind], "fp8") == Held("fp8", made)
    row = FloatLayout("fp8", (1, 64), in_rows=True)
    kept = dict.fromkeys(range(2), ExpertLayouts(row, row, kept=True))
    for kind in ("fp8-channel", "fp8-tensor"):
        for setting in ("auto", "keep"):
            assert scaled(folders[kind], setting) == Held("keep", kept)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("kind", "setting", "words"),
    [
        ("none", "auto", "this checkpoint is not quantised; set model.quantization to fp8"),
        ("none", "keep", "this checkpoint is not quantised; set model.quantization to fp8"),
        ("int4", "auto", "layer 0 are stored otherwise .*; set model.quantization to fp8"),
        ("fp8-block", "auto", "layer 0 are stored otherwise .*; set model.quantization to fp8"),
        ("mxfp4", "keep", "layer 0 are stored otherwise .*; set model.quantization to fp8"),
        ("int4-g-idx", "auto", "g_idx.*; set model.quantization to fp8"),
        ("fp8-channel", "dequantize", "model.quantization = dequantize holds them otherwise"),
        ("fp8-channel", "int8", "model.quantization = int8 holds them otherwise"),
    ],
)
def test_what_scaled_mm_does_not_compute_on_is_refused(kind, setting, words, folders):
    with pytest.raises(ValueError, match=f"moe.experts.backend: 'scaled_mm' .*{words}"):
        scaled(folders[kind], setting)


@pytest.mark.usefixtures("hopper")
def test_scaled_mm_is_refused_for_other_experts_and_devices(folders, tmp_path):
    make_checkpoint("gpt_oss", tmp_path / "gpt_oss", overrides={"vocab_size": 97})
    with pytest.raises(ValueError, match="plain SwiGLU experts alone.*activation gpt_oss, biases"):
        scaled(tmp_path / "gpt_oss", "fp8")
    for options in ({"device": CPU}, {"dtype": torch.float16}):
        with pytest.raises(ValueError, match="'scaled_mm' needs a GPU"):
            scaled(folders["fp8-channel"], "fp8", **options)


KEPT_128 = Held(
    "keep",
    dict.fromkeys(range(2), replace(ExpertLayouts.of_fp8_blocks(), kept=True)),
)
MADE_128 = Held("fp8", dict.fromkeys(range(2), ExpertLayouts.of_fp8_blocks()))


@pytest.fixture
def library(monkeypatch, hopper):
    """DeepGEMM, and a GPU that it runs on."""
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_module())


def by_library(folder: Path, setting: str, backend: str = "deep_gemm", **more) -> Held:
    options = {"device": CUDA, "dtype": torch.bfloat16, **more}
    return resolved(folder, setting, backend=backend, **options)


@pytest.mark.usefixtures("library")
def test_deep_gemm_takes_fp8_in_blocks_of_128_made_or_stored(folders):
    for setting in ("auto", "keep"):
        assert by_library(folders["fp8-128"], setting) == KEPT_128
    for kind in ("fp8-128", "wide"):
        assert by_library(folders[kind], "fp8") == MADE_128
    for layouts in (*KEPT_128.layouts.values(), *MADE_128.layouts.values()):
        assert layouts.backend == "deep_gemm"


@pytest.mark.usefixtures("library")
def test_auto_takes_deep_gemm_for_such_experts_alone_and_torch_never(folders, monkeypatch):
    for setting in ("auto", "keep"):
        assert by_library(folders["fp8-128"], setting, "auto") == KEPT_128
    assert by_library(folders["wide"], "fp8", "auto") == MADE_128
    others = [
        by_library(folders["fp8-128"], "keep", "torch"),
        by_library(folders["fp8-128"], "int8", "auto"),
        by_library(folders["fp8-block"], "keep", "auto"),
        by_library(folders["none"], "fp8", "auto"),  # 64 wide
        by_library(folders["fp8-128"], "keep", "auto", dtype=torch.float16),
        by_library(folders["fp8-128"], "keep", "auto", device=CPU, dtype=torch.float32),
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    others.append(by_library(folders["fp8-128"], "keep", "auto"))
    for held in others:
        assert {each.backend for each in held.layouts.values()} == {"quantised"}


@pytest.mark.usefixtures("hopper")
def test_auto_keeps_its_choice_where_deep_gemm_does_not_import(folders, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    held = by_library(folders["fp8-128"], "auto", "auto")
    assert held.name == "keep" and held.layouts[0].backend == "quantised"
    module = fake_module()
    del module.m_grouped_fp8_gemm_nt_contiguous
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    assert by_library(folders["fp8-128"], "auto", "auto") == held
    assert "has no m_grouped_fp8_gemm_nt_contiguous" in caplog.text
    assert "going on without DeepGEMM" in caplog.text


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("kind", "setting", "words"),
    [
        ("wide", "auto", "this checkpoint is not quantised; set model.quantization to fp8"),
        ("fp8-128", "int8", "model.quantization = int8 holds them otherwise"),
        ("fp8-block", "auto", "multiples of 128, and one of this checkpoint is 64"),
        ("none", "fp8", "multiples of 128, and one of this checkpoint is 64"),
    ],
)
def test_what_deep_gemm_does_not_compute_on_is_refused(kind, setting, words, folders):
    with pytest.raises(ValueError, match=f"moe.experts.backend: 'deep_gemm' .*{words}"):
        by_library(folders[kind], setting)


@pytest.mark.usefixtures("library")
def test_deep_gemm_is_refused_for_other_scales_and_experts(folders, tmp_path):
    source, stored = folders["wide"], tmp_path / "channel"
    quantise_checkpoint(source, "fp8-channel", stored, tmp_path / "plain")
    with pytest.raises(ValueError, match="a scale per block of 128x128, and those of layer 0"):
        by_library(stored, "keep")
    wide = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 128}
    make_checkpoint("gpt_oss", tmp_path / "gpt_oss", overrides=wide)
    with pytest.raises(ValueError, match="plain SwiGLU experts alone"):
        by_library(tmp_path / "gpt_oss", "fp8")
    assert by_library(tmp_path / "gpt_oss", "fp8", "auto").layouts[0].backend == "quantised"
