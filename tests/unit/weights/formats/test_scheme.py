"""What a quantization_config means, and which are refused.

python -m pytest tests/unit/weights/formats/test_scheme.py
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.weights.formats.scheme import (
    SUPPORTED,
    Scheme,
    read_scheme,
    scheme_of,
)
from tests.helpers.packers import CONFIGS

DEEPSEEK_V3 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
KIMI_K2_THINKING = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "weights": {
                "type": "int",
                "num_bits": 4,
                "strategy": "group",
                "group_size": 32,
                "symmetric": True,
            },
        }
    },
}


def grouped(kind: str, bits: int, strategy: str, form: str) -> dict[str, Any]:
    weights = {"type": kind, "num_bits": bits, "strategy": strategy}
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"g": group}}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (DEEPSEEK_V3, Scheme("fp8", block=(128, 128))),
        (KIMI_K2_THINKING, Scheme("compressed-tensors", bits=4, group_size=32)),
        ({"quant_method": "mxfp4"}, Scheme("mxfp4")),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, Scheme("modelopt")),
        (CONFIGS["awq"], Scheme("awq", group_size=16)),
        (CONFIGS["gptq"], Scheme("gptq", group_size=16, zero_offset=1, act_order=True)),
        (CONFIGS["gptq-in-order"], Scheme("gptq", group_size=16, zero_offset=1)),
        (CONFIGS["gptq-v2"], Scheme("gptq", group_size=16, act_order=True)),
        ({**CONFIGS["gptq"], "group_size": -1}, Scheme("gptq", zero_offset=1, act_order=True)),
    ],
)
def test_published_configurations_are_read(values, expected):
    assert read_scheme(values) == expected


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method = 'bitsandbytes'"),
        ({}, "quant_method = None"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt = 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"block of \[128\]"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo = 'NVFP4'"),
        ({**CONFIGS["awq"], "version": "gemv"}, "version = 'gemv'"),
        ({**CONFIGS["gptq"], "bits": 3}, "bits = 3"),
        ({**CONFIGS["gptq"], "checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"),
        ({**CONFIGS["gptq"], "group_size": 0}, "group_size = 0"),
        ({"quant_method": "compressed-tensors"}, "without config_groups"),
        (
            grouped("float", 4, "tensor_group", "nvfp4-pack-quantized"),
            r"nvfp4-pack-quantized \(g: float4 per tensor_group\)",
        ),
        (grouped("int", 8, "channel", "int-quantized"), "int-quantized"),
        (grouped("int", 3, "group", "pack-quantized"), "int3 per group"),
    ],
)
def test_other_schemes_are_refused_with_those_that_are_supported(values, named):
    with pytest.raises(ValueError, match=named) as caught:
        read_scheme(values)
    assert SUPPORTED in str(caught.value)


def test_a_configuration_of_text_inside_another_and_a_file_of_its_own_count_too(tmp_path):
    assert scheme_of(tmp_path) is None
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"text_config": {"quantization_config": DEEPSEEK_V3}}))
    assert scheme_of(tmp_path) == Scheme("fp8", block=(128, 128))
    config.write_text("{}")
    assert scheme_of(tmp_path) is None
    apart = {"producer": {}, "quantization": {"quant_algo": "FP8", "exclude_modules": []}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(apart))
    assert scheme_of(tmp_path) == Scheme("modelopt")
