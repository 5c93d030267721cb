"""engine/models/config_fields.py: a wrong field of config.json is named, with what is allowed.

python -m pytest tests/unit/models/test_config_fields.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.models.registry import read_config
from tests.helpers.model_cases import CASES

FAMILIES = (
    "mixtral",
    "olmoe",
    "qwen2-moe",
    "qwen3-moe",
    "deepseek-v2-lite",
    "deepseek-v3",
    "glm4-moe",
    "minimax-m2",
    "ernie4-5-moe",
    "gpt-oss",
    "longcat-flash",
)
ODD = (None, "64", 64.5, 64.0, True, [64], {"a": 1}, 0, -1, 10**30, float("inf"))


def outcome(folder: Path, case: str, **settings: Any) -> str:
    """What is said of a case's config.json with some fields changed, "" where it is accepted."""
    values = CASES[case].config().to_dict() | settings
    values = {name: value for name, value in values.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(values))
    try:
        read_config(folder)
    except ValueError as error:
        return str(error).removeprefix(f"model.path = {str(folder)!r}: ")
    return ""


@pytest.mark.parametrize(
    ("case", "field", "value", "text"),
    [
        ("mixtral", "hidden_size", None, "hidden_size = null in config.json: must be a whole"),
        ("mixtral", "hidden_size", "64", "hidden_size = '64' in config.json: must be a whole"),
        ("mixtral", "num_hidden_layers", -2, "num_hidden_layers = -2 in config.json: must be a"),
        ("mixtral", "num_hidden_layers", 10**9, "must be a whole number from 1 to 100000"),
        ("deepseek-v3", "n_routed_experts", 10**9, "must be a whole number from 1 to 100000"),
        ("mixtral", "vocab_size", 0, "vocab_size = 0 in config.json: must be a whole number from"),
        ("mixtral", "sliding_window", "4", "sliding_window = '4' in config.json: must be a whole"),
        ("mixtral", "rms_norm_eps", None, "rms_norm_eps = null in config.json: must be a finite"),
        ("mixtral", "rms_norm_eps", -1e-6, "rms_norm_eps = -1e-06 in config.json: must be a fini"),
        ("mixtral", "tie_word_embeddings", 1, "tie_word_embeddings = 1 in config.json: must be t"),
        ("mixtral", "eos_token_id", "2", "eos_token_id = '2' in config.json: must be a token id"),
        ("mixtral", "eos_token_id", [2, "3"], "eos_token_id = [2, '3'] in config.json: must be a"),
        ("mixtral", "dtype", "half16", "dtype = 'half16' in config.json: must be float32, bfloat"),
        ("mixtral", "torch_dtype", "int8", "torch_dtype = 'int8' in config.json: must be float32"),
        ("mixtral", "router_aux_loss_coef", "x", "router_aux_loss_coef = 'x' in config.json: must"),
        ("mixtral", "num_experts_per_tok", None, "num_experts_per_tok = null in config.json: must"),
        ("mixtral", "hidden_act", ["silu"], "hidden_act = ['silu'] in config.json: must be text"),
        ("mixtral", "max_position_embeddings", 1e3, "max_position_embeddings = 1000.0 in config"),
        ("mixtral", "head_dim", 7, "head_dim = 7 in config.json: must be an even"),
        ("olmoe", "clip_qkv", 0, "clip_qkv = 0 in config.json: must be a finite number above 0"),
        ("qwen2-moe", "mlp_only_layers", 1, "mlp_only_layers = 1 in config.json: must be a list"),
        ("qwen2-moe", "layer_types", ["full_attention"], "layer_types"),
        ("qwen2-moe", "decoder_sparse_step", 0, "decoder_sparse_step = 0 in config.json: must be"),
        ("deepseek-v3", "v_head_dim", 0, "v_head_dim = 0 in config.json: must be a whole number"),
        ("deepseek-v3", "moe_layer_freq", 0, "moe_layer_freq = 0 in config.json: must be a whole"),
        ("deepseek-v3", "first_k_dense_replace", None, "first_k_dense_replace = null in config.j"),
        ("deepseek-v3", "routed_scaling_factor", None, "routed_scaling_factor = null in config.j"),
    ],
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(
    tmp_path, case, field, value, text
):
    assert text in outcome(tmp_path, case, **{field: value})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rope_parameters": ..., "rope_theta": None}, "rope_theta = null in config.json: must be"),
        ({"rope_parameters": ..., "rope_theta": "1e4"}, "rope_theta = '1e4' in config.json: must"),
        ({"rope_parameters": ..., "rope_theta": 0}, "rope_theta = 0 in config.json: must be a fi"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn' in config.json: must be an object"),
        ({"rope_scaling": []}, "rope_scaling = [] in config.json: must be an object"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor = null in config.json: must be"),
        ({"rope_scaling": {"type": 7}}, "rope_scaling.type = 7 in config.json: must be text"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": "4", "rope_theta": 1e4}},
            "rope_parameters.factor = '4' in config.json: must be a finite number from 1",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": -1}},
            "rope_parameters.rope_theta = -1 in config.json: must be a finite number above 0",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters.full_attention in config.json is an object: all layers",
        ),
        (
            {
                "head_dim": 8,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                },
            },
            "rope_parameters.short_factor in config.json has 1 numbers: must have 4",
        ),
    ],
)
def test_a_wrong_rotary_embedding_is_described_by_its_field(tmp_path, settings, text):
    assert text in outcome(tmp_path, "mixtral", **settings)


@pytest.mark.parametrize("case", FAMILIES)
def test_no_odd_value_of_any_field_is_described_by_a_python_error(tmp_path, case):
    fields = [*CASES[case].config().to_dict(), "torch_dtype", "rope_scaling", "moe_layer_freq"]
    for field in fields:
        if field in ("id2label", "label2id", "transformers_version", "_name_or_path"):
            continue  # not of the model
        for value in ODD:
            text = outcome(tmp_path, case, **{field: value})
            python = [word for word in ("Error", "NoneType", "<class", "operand") if word in text]
            assert not python, (field, value, text)
            named = field.replace("num_local_experts", "num_experts")  # two names in qwen3_moe
            assert not text or named in text or "num_local_experts" in text, (field, value, text)
            assert not text or "config.json" in text, (field, value, text)
