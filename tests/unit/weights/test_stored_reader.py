"""engine/weights/stored_reader.py: weights that are kept as they are stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.moe.low_bit_experts import ExpertLayouts, LowBitExperts
from engine.ops.quantised_rows import FloatLayout, IntegerLayout, Layout
from engine.weights.loader import CheckpointError, load_weights
from engine.weights.slot import WeightSlot
from tests.helpers.packers import CONFIGS, GROUP, PACKERS, Tensors

ROWS, COLUMNS = 64, 96
LAYOUTS: dict[str, Layout] = {
    "fp8-channel": FloatLayout("fp8", (1, COLUMNS)),
    "int4-zero-point": IntegerLayout(4, GROUP, has_zero=True),
}


def stored_as(kind: str) -> Tensors:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    return PACKERS[kind](weight, torch.Generator().manual_seed(2))


def keep(folder: Path, kind: str, stored: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """Load w2 of one expert as it is stored; return its values."""
    save_file(
        {f"m.{suffix}": tensor for suffix, tensor in stored.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": CONFIGS[kind]}))
    layouts = ExpertLayouts(LAYOUTS[kind], LAYOUTS[kind], kept=True)
    held = LowBitExperts(1, ROWS, COLUMNS, layouts, torch.device("cpu"), dtype)
    sink = held.rows("w2", 0, 0, ROWS)
    target = torch.empty(ROWS, COLUMNS, dtype=dtype, device="meta")
    load_weights(folder, [WeightSlot("m.weight", target, (ROWS, COLUMNS), sink=sink)])
    return held.values(0)[1]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_kept_values_that_the_products_dtype_cannot_hold_are_named(kind, tmp_path):
    stored = stored_as(kind)
    stored["weight_scale"] = stored["weight_scale"].float().fill_(1e4)
    with pytest.raises(CheckpointError, match=r"m\.weight \(from .*too large for torch.float16;"):
        keep(tmp_path, kind, stored, torch.float16)
    assert keep(tmp_path, kind, stored, torch.bfloat16).abs().max() > 65504


def test_a_large_scale_of_small_values_is_kept(tmp_path):
    stored = stored_as("fp8-channel")
    stored["weight"] = torch.full((ROWS, COLUMNS), 0.5).to(torch.float8_e4m3fn)
    stored["weight_scale"] = torch.full((ROWS, 1), 1024.0)
    assert keep(tmp_path, "fp8-channel", stored, torch.float16).eq(512).all()
