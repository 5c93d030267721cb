"""engine/generation/quantization.py: how weights are held, by setting, checkpoint and device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.config import Config, ExpertsConfig, ModelConfig, MoEConfig
from engine.generation import quantization
from engine.generation.quantization import Held, resolve_quantization
from engine.models.registry import read_config, read_spec
from engine.moe.low_bit_experts import ExpertLayouts
from engine.ops.quantised_rows import IntegerLayout
from tests.helpers.packers import GROUP, quantise_checkpoint
from tools.make_random_checkpoint import make_checkpoint

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    make_checkpoint("qwen3_moe", root / "none", overrides={"num_experts": 4, "vocab_size": 97})
    for kind in ("int4", "int4-g-idx", "awq", "mxfp4", "fp8-block"):
        quantise_checkpoint(root / "none", kind, root / kind, root / f"{kind}-plain")
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


def test_what_is_not_quantised_is_as_it_is_unless_integers_are_asked_for(folders):
    for setting in ("auto", "dequantize", "keep"):
        assert resolved(folders["none"], setting) == Held("none")
        assert resolved(folders["int4"], setting, load_format="dummy") == Held("none")
    for setting, bits in (("int8", 8), ("int4", 4)):
        layouts = dict.fromkeys(range(2), ExpertLayouts.of_bits(bits, 32))
        for folder in ("none", "int4", "mxfp4"):
            assert resolved(folders[folder], setting) == Held(setting, layouts)


def test_integers_are_kept_with_their_groups_and_zero_points(folders):
    for kind, has_zero in (("int4", False), ("awq", True)):
        layout = IntegerLayout(4, GROUP, has_zero)
        layouts = dict.fromkeys(range(2), ExpertLayouts(layout, layout, kept=True))
        assert resolved(folders[kind], "keep") == Held("keep", layouts)
        assert resolved(folders[kind], "dequantize") == Held("dequantize")


def test_auto_keeps_what_a_compiled_kernel_computes_on(folders, monkeypatch):
    monkeypatch.setattr(quantization.native, "available", lambda: True)
    assert resolved(folders["int4"], "auto").name == "keep"
    for kind in ("int4-g-idx", "mxfp4", "fp8-block"):
        assert resolved(folders[kind], "auto") == Held("dequantize")
    assert resolved(folders["int4"], "auto", device=CUDA) == Held("dequantize")
    assert resolved(folders["int4"], "auto", dtype=torch.bfloat16) == Held("dequantize")
    assert resolved(folders["int4"], "auto", backend="grouped_mm") == Held("dequantize")
    monkeypatch.setattr(quantization.native, "available", lambda: False)
    assert resolved(folders["int4"], "auto") == Held("dequantize")


@pytest.mark.parametrize("setting", ["int8", "int4", "keep"])
@pytest.mark.parametrize("backend", ["te", "grouped_mm"])
def test_backends_of_other_weights_are_refused(backend, setting, folders):
    with pytest.raises(ValueError, match=f"moe.experts.backend: '{backend}'.*{setting}.*to auto"):
        resolved(folders["int4"], setting, backend=backend)


@pytest.mark.parametrize(
    ("kind", "setting", "words"),
    [
        ("fp8-block", "keep", "'keep': fp8: model.layers.0.*no matrix of integers"),
        ("int4-g-idx", "keep", "'keep': compressed-tensors: .*g_idx.*are kept"),
        ("mxfp4", "keep", "'keep': mxfp4, such as model.layers.0.*experts.*are kept"),
        ("none", "fp8", "'fp8': needs an experts backend that computes on FP8"),
    ],
)
def test_what_is_not_held_is_refused_with_what_to_set(kind, setting, words, folders):
    with pytest.raises(ValueError, match=f"model.quantization: {words}.*set model.quantization to"):
        resolved(folders[kind], setting)
