"""What the families make of settings that mean the same in several spellings.

python -m pytest tests/unit/models/test_specs.py
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.layers.attention import AttentionSpec
from engine.models.hf_config import check_config
from engine.models.registry import read_config, read_spec
from engine.models.spec import ModelSpec, SparseSpec
from tests.helpers.model_cases import CASES


def spec_of(folder: Path, case: str, **settings: Any) -> ModelSpec:
    """The spec of a case's config.json with some fields changed."""
    values = CASES[case].config().to_dict() | settings
    (folder / "config.json").write_text(json.dumps(values))
    return read_spec(read_config(folder))


def windows(spec: ModelSpec) -> list[int | None]:
    attentions = [layer.attention for layer in spec.layers]
    return [each.window for each in attentions if isinstance(each, AttentionSpec)]


@pytest.mark.parametrize("window", [None, 0, -1])
@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("mixtral", {}),
        ("qwen3-moe", {"use_sliding_window": True}),
        ("qwen2-moe", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}),
        ("qwen2-moe", {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}),
    ],
)
def test_a_window_of_null_zero_or_less_is_none(tmp_path, case, settings, window):
    assert windows(spec_of(tmp_path, case, sliding_window=window, **settings)) == [None, None]


@pytest.mark.parametrize("case", ["qwen2-moe", "qwen3-moe"])
def test_a_window_that_is_not_used_is_none(tmp_path, case):
    settings = {"sliding_window": 4, "use_sliding_window": False}
    assert windows(spec_of(tmp_path, case, **settings)) == [None, None]


def test_a_window_of_one_is_a_window(tmp_path):
    assert windows(spec_of(tmp_path, "mixtral", sliding_window=1)) == [1, 1]


def test_a_shared_expert_of_size_0_is_none(tmp_path):
    spec = spec_of(tmp_path, "qwen2-moe", shared_expert_intermediate_size=0)
    for layer in spec.layers:
        assert isinstance(layer.mlp, SparseSpec)
        assert layer.mlp.shared is None and not layer.mlp.shared_gate


def test_a_family_says_which_activations_it_takes():
    config = SimpleNamespace(hidden_act="relu2", is_causal=True, quantization_config=None)
    check_config(config, ("relu2",))
    with pytest.raises(ValueError, match="hidden_act: 'relu2' .* only 'gelu' or 'silu'"):
        check_config(config, ("gelu", "silu", "swish"))
