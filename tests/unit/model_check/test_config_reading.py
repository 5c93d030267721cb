"""What is missing for models that no family reads, from configurations as transformers has them.

Run: pytest tests/unit/model_check/test_config_reading.py
"""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

from engine.model_check.config_reading import read_checkpoint_config


def problems_of(tmp_path, model_type: str, **settings) -> list[str]:
    config = CONFIG_MAPPING[model_type]().to_dict() | {"model_type": model_type} | settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_checkpoint_config(tmp_path).problems


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [
        (
            "deepseek_v4",
            ["an indexer chooses", "hyper-connections", "compressed_sparse", "rotary"],
        ),
        ("nemotron_h", ["Mamba layers"]),
        ("gemma4", ["different widths", "for each layer", "no number of experts", "rotary"]),
        ("lfm2_moe", ["short convolutions"]),
        ("granitemoehybrid", ["mamba_n_heads, mamba_d_state", "linear_attention"]),
        ("llama", ["no number of experts"]),
    ],
)
def test_each_part_that_no_family_has_is_named_once(tmp_path, model_type, missing):
    known, *others = problems_of(tmp_path, model_type)
    assert f"model_type = {model_type!r}" in known
    assert len(others) == len(missing)
    for part, problem in zip(missing, others, strict=True):
        assert part in problem


def test_parts_that_some_family_has_are_not_missing(tmp_path):
    settings = {
        "hidden_act": "relu2",
        "moe_latent_size": 64,
        "num_experts_per_tok": [1, 2],
        "partial_rotary_factor": 0.5,
        "scoring_func": "sqrtsoftplus",
        "layer_types": ["sliding_attention", "full_attention"],
    }
    assert len(problems_of(tmp_path, "phimoe", **settings)) == 1
    assert "CONTRIBUTING.md" in read_checkpoint_config(tmp_path).remarks[0]


def test_gated_deltanet_is_no_other_linear_attention(tmp_path):
    kinds = {"layer_types": ["linear_attention", "full_attention"]}
    assert len(problems_of(tmp_path, "phimoe", **kinds)) == 2
    assert len(problems_of(tmp_path, "phimoe", **kinds, linear_num_key_heads=4)) == 1


def test_a_file_in_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        read_checkpoint_config(tmp_path / "config.json")
