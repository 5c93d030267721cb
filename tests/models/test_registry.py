"""From a published config.json to a `ModelSpec`, and the configurations that are refused.

python -m pytest tests/models/test_registry.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GPT2Config

from engine.config import Config, ModelConfig
from engine.layers.attention import AttentionSpec
from engine.layers.gated_delta import GatedDeltaSpec
from engine.layers.mla import MLASpec
from engine.models import registry
from engine.models.model_types import supported_model_types
from engine.models.registry import model_length, read_config, read_spec
from engine.models.spec import DenseSpec, SparseSpec
from tests.helpers.model_cases import CASES

GPT_OSS_120B = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_local_experts": 128,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}


def published(tmp_path: Path, **settings: Any) -> Any:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)


def test_the_published_deepseek_v2_lite_configuration_is_understood(tmp_path):
    config = published(
        tmp_path,
        architectures=["DeepseekV2ForCausalLM"],
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        model_type="deepseek_v2",
        first_k_dense_replace=1,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=10944,
        kv_lora_rank=512,
        max_position_embeddings=163840,
        moe_intermediate_size=1408,
        moe_layer_freq=1,
        n_group=1,
        n_routed_experts=64,
        n_shared_experts=2,
        norm_topk_prob=False,
        num_attention_heads=16,
        num_experts_per_tok=6,
        num_hidden_layers=27,
        num_key_value_heads=16,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        rms_norm_eps=1e-06,
        rope_scaling={
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        rope_theta=10000,
        routed_scaling_factor=1.0,
        scoring_func="softmax",
        topk_group=1,
        topk_method="greedy",
        v_head_dim=128,
        vocab_size=102400,
    )
    spec = read_spec(config)
    attention = spec.layers[0].attention
    assert isinstance(attention, MLASpec)
    assert attention.scale == pytest.approx(192**-0.5 * 1.5896, rel=1e-4)
    assert spec.layers[0].mlp == DenseSpec(ffn=10944)
    sparse = spec.layers[1].mlp
    assert isinstance(sparse, SparseSpec)
    assert (sparse.moe.router.num_experts, sparse.moe.router.top_k) == (64, 6)
    assert sparse.shared == DenseSpec(ffn=2816)
    assert all(layer.mlp == sparse for layer in spec.layers[1:])


def test_the_published_qwen15_moe_configuration_does_not_slide(tmp_path):
    config = published(
        tmp_path,
        model_type="qwen2_moe",
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=5632,
        max_position_embeddings=8192,
        max_window_layers=21,
        moe_intermediate_size=1408,
        num_attention_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
        num_hidden_layers=24,
        num_key_value_heads=16,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        shared_expert_intermediate_size=5632,
        sliding_window=32768,
        use_sliding_window=False,
        vocab_size=151936,
    )
    spec = read_spec(config)
    layer = spec.layers[5]
    assert isinstance(layer.attention, AttentionSpec) and isinstance(layer.mlp, SparseSpec)
    assert layer.attention.window is None and layer.attention.qkv_bias
    assert not layer.attention.out_bias
    assert layer.mlp.shared_gate and not layer.mlp.moe.router.normalize


def test_the_published_gpt_oss_120b_configuration_is_understood(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS_120B))
    config = read_config(tmp_path)
    spec = read_spec(config)
    assert len(spec.layers) == 36 and not spec.tied_embeddings and spec.rotary_dim == 64
    windows = []
    for layer in spec.layers:
        attention = layer.attention
        assert isinstance(attention, AttentionSpec) and attention.sinks
        assert attention.qkv_bias and attention.out_bias and attention.head_dim == 64
        windows.append(attention.window)
    assert windows == [128, None] * 18
    sparse = spec.layers[0].mlp
    assert isinstance(sparse, SparseSpec) and sparse.shared is None
    assert (sparse.moe.router.num_experts, sparse.moe.router.top_k) == (128, 4)
    assert sparse.moe.router.logit_bias and sparse.moe.router.normalize
    assert (sparse.moe.experts.limit, sparse.moe.experts.alpha) == (7.0, 1.702)
    assert model_length(config, None) == 131072


def test_the_published_qwen3_next_configuration_is_understood(tmp_path):
    config = published(
        tmp_path,
        architectures=["Qwen3NextForCausalLM"],
        model_type="qwen3_next",
        attention_bias=False,
        decoder_sparse_step=1,
        full_attention_interval=4,
        head_dim=256,
        hidden_act="silu",
        hidden_size=2048,
        intermediate_size=5120,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_value_head_dim=128,
        max_position_embeddings=262144,
        mlp_only_layers=[],
        moe_intermediate_size=512,
        norm_topk_prob=True,
        num_attention_heads=16,
        num_experts=512,
        num_experts_per_tok=10,
        num_hidden_layers=48,
        num_key_value_heads=2,
        partial_rotary_factor=0.25,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=10000000,
        shared_expert_intermediate_size=512,
        tie_word_embeddings=False,
        vocab_size=151936,
    )
    spec = read_spec(config)
    linear, full = spec.layers[0].attention, spec.layers[3].attention
    assert isinstance(linear, GatedDeltaSpec) and isinstance(full, AttentionSpec)
    assert [layer.attention for layer in spec.layers] == [linear, linear, linear, full] * 12
    assert linear.by_key_head and (linear.channels, linear.values) == (8192, 4096)
    assert full.output_gate and full.qk_norm == "head" and full.norm_offset == 1.0
    assert spec.rotary_dim == 64 and spec.norm_offset == 1.0
    sparse = spec.layers[0].mlp
    assert isinstance(sparse, SparseSpec) and sparse.shared == DenseSpec(ffn=512)
    assert sparse.shared_gate and sparse.moe.router.normalize
    assert (sparse.moe.router.num_experts, sparse.moe.router.top_k) == (512, 10)


def test_layers_follow_moe_layer_freq():
    config = CASES["deepseek-v2-lite"].config()
    config.num_hidden_layers, config.moe_layer_freq = 6, 2
    kinds = [isinstance(layer.mlp, SparseSpec) for layer in read_spec(config).layers]
    assert kinds == [False, False, True, False, True, False]


def test_an_unknown_model_type_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="model_type: 'gpt2'") as caught:
        read_spec(GPT2Config())
    assert all(name in str(caught.value) for name in supported_model_types())


@pytest.mark.parametrize(
    ("case", "field", "value", "message"),
    [
        ("mixtral", "hidden_act", "gelu", "hidden_act: 'gelu'"),
        ("mixtral", "quantization_config", {"quant_method": "hqq"}, "quant_method = 'hqq'"),
        ("mixtral", "is_causal", False, "is_causal: False"),
        ("qwen3-moe", "is_causal", False, "is_causal: False"),
        ("ernie4-5-moe", "use_bias", True, "use_bias: True .* the head would have a bias"),
        ("minimax-m2", "scoring_func", "softmax", "scoring_func: 'softmax' .* only 'sigmoid'"),
        ("minimax-m2", "use_qk_norm", False, "use_qk_norm: False"),
        ("minimax-m2", "shared_intermediate_size", 8, "shared_intermediate_size: 8"),
        ("longcat-flash", "zero_expert_type", "copy", "zero_expert_type: 'copy' .* 'identity'"),
        ("longcat-flash", "mla_scale_q_lora", False, "mla_scale_q_lora: False .* only True"),
        ("longcat-flash", "router_bias", True, "router_bias: True .* only False"),
        ("longcat-flash", "norm_topk_prob", True, "norm_topk_prob: True .* only False"),
        ("gpt-oss", "layer_types", ["full_attention"] * 3, "layer_types"),
        ("gpt-oss", "layer_types", ["chunked_attention"] * 2, "layer_types: .* 'full_attention'"),
        ("gpt-oss", "sliding_window", None, "sliding_window: None .* whole number from 1"),
        ("gpt-oss", "sliding_window", 0, "sliding_window: 0 .* whole number from 1"),
        ("gpt-oss", "hidden_act", "gelu", "hidden_act: 'gelu'"),
        ("llama4", "layer_types", ["full_attention"] * 3, "layer_types: .* must have 4 entries"),
        ("llama4", "layer_types", ["sliding_attention"] * 4, "layer_types: .* 'chunked_attention'"),
        ("llama4", "no_rope_layers", [1, 0], "no_rope_layers: .* one entry per layer, 4"),
        ("llama4", "attention_chunk_size", None, "attention_chunk_size .*null"),
        ("llama4", "num_experts_per_tok", 2, "num_experts_per_tok: 2 .* only 1"),
        ("minimax-m2", "attn_type_list", [1, 0], "attn_type_list: .* full attention alone"),
        *(
            (case, "rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, message)
            for case, message in (
                ("mixtral", "partial_rotary_factor: 0.5 .* in mixtral models the whole head"),
                ("deepseek-v3", "partial_rotary_factor: 0.5 .* in deepseek_v3 models"),
            )
        ),
        (
            "glm4-moe",
            "rope_parameters",
            {"rope_theta": 1e4, "partial_rotary_factor": 0.4},
            "partial_rotary_factor = 0.4 .* rotates 3 of a head's 8 dims: must be an even number",
        ),
        ("deepseek-v3", "moe_layer_freq", [1], "moe_layer_freq: .* one entry per layer"),
        ("mixtral", "num_experts_per_tok", 5, "num_experts_per_tok: 5"),
        ("deepseek-v2-lite", "topk_method", "noaux_tc", "topk_method: 'noaux_tc'"),
        ("deepseek-v2-lite", "norm_topk_prob", True, "norm_topk_prob: True"),
        ("deepseek-v2-lite", "num_experts_per_tok", None, "num_experts_per_tok .*null"),
        ("deepseek-v2-groups-q-lora-biases", "n_group", None, "n_group .*null"),
    ],
)
def test_configurations_nothing_here_can_run_are_refused(case, field, value, message):
    config = CASES[case].config()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        read_spec(config)


def test_the_context_is_the_limit_unless_scaling_is_dynamic():
    plain = CASES["mixtral"].config()
    assert model_length(plain, None) == 64
    assert model_length(plain, 10) == 10
    with pytest.raises(ValueError, match=r"model\.max_model_len: 65 .* at most 64"):
        model_length(plain, 65)
    assert model_length(CASES["mixtral-dynamic-rope"].config(), 65) == 65


def test_a_table_of_positions_that_does_not_fit_names_max_model_len(monkeypatch):
    def fail(*arguments: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(registry, "RotaryTable", fail)
    config = Config(model=ModelConfig(path="x", max_model_len=2**31 - 1))
    hf_config, topology = CASES["mixtral-dynamic-rope"].config(), cast(Any, None)
    with pytest.raises(ValueError, match=r"^model\.max_model_len = 2147483647: a table of"):
        registry.build_model(hf_config, config, topology, torch.device("cpu"), torch.float32)


# --- config.json as it lies in the checkpoint -----------------------------------------------------


def refusal(folder: Path, text: str) -> str:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_config(folder)
    message = str(caught.value)
    assert message.startswith(f"model.path = {str(folder)!r}: ")
    assert "trust_remote_code" not in message
    return message


def altered(case: str = "mixtral", **settings: Any) -> str:
    """The case's config.json with some fields changed, or left out where the value is ..."""
    values = CASES[case].config().to_dict() | settings
    return json.dumps({name: value for name, value in values.items() if value is not ...})


@pytest.mark.parametrize("case", CASES)
def test_a_good_config_json_is_read_as_transformers_reads_it(case, tmp_path):
    (tmp_path / "config.json").write_text(altered(case))
    expected = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert read_config(tmp_path).to_dict() == expected.to_dict()


def test_a_quantisation_that_is_not_read_is_refused_with_scheme_tensor_and_what_is_read(tmp_path):
    packed = {
        "m.weight": torch.zeros(4, 4),
        "m.weight_packed": torch.zeros(4, 2, dtype=torch.uint8),
    }
    save_file(packed, tmp_path / "model.safetensors")
    scheme = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    text = refusal(tmp_path, altered(quantization_config=scheme))
    assert "modelopt with quant_algo = 'NVFP4' is not supported" in text
    assert "supported are FP8 E4M3" in text
    assert "m.weight_packed in model.safetensors, U8 [4, 2]" in text


# The name of the number of experts in each family's config.json.
NUM_EXPERTS = {
    "mixtral": "num_local_experts",
    "olmoe": "num_experts",
    "qwen2-moe": "num_experts",
    "qwen3-moe": "num_experts",
    "deepseek-v2-lite": "n_routed_experts",
    "deepseek-v3": "n_routed_experts",
    "glm4-moe": "n_routed_experts",
    "minimax-m2": "num_local_experts",
    "gpt-oss": "num_local_experts",
    "llama4": "num_local_experts",
    "qwen3-next": "num_experts",
    "qwen3-5-moe": "num_experts",
}


@pytest.mark.parametrize("case", NUM_EXPERTS)
@pytest.mark.parametrize("value", [0, -1, True, None, "8", 8.0, [8], 10**30])
def test_numbers_of_experts_are_whole_numbers_named_by_field(tmp_path, case, value):
    for field in (NUM_EXPERTS[case], "num_experts_per_tok"):
        if value == 0 and field == "num_experts" and case.startswith("qwen"):
            continue  # the next test
        text = refusal(tmp_path, altered(case, **{field: value}))
        if (
            value == 0
            and value is not False
            and case in ("olmoe", "mixtral", "minimax-m2", "gpt-oss", "llama4")
        ):
            assert "num_experts_per_tok" in text and "must be" in text
            continue
        assert f"{field} = " in text and "in config.json: must be a whole number from" in text


@pytest.mark.parametrize("case", ["qwen2-moe", "qwen3-moe", "qwen3-next"])
def test_a_qwen_model_of_0_experts_is_dense_as_in_transformers(tmp_path, case):
    zero = {"num_local_experts": 0} if case == "qwen3-moe" else {"num_experts": 0}
    (tmp_path / "config.json").write_text(altered(case, **zero))
    layers = read_spec(read_config(tmp_path)).layers
    assert layers and all(isinstance(layer.mlp, DenseSpec) for layer in layers)


@pytest.mark.parametrize("case", NUM_EXPERTS)
def test_more_experts_per_token_than_experts_are_refused_by_field(tmp_path, case):
    text = refusal(tmp_path, altered(case, num_experts_per_tok=1000))
    assert "num_experts_per_tok: 1000 must be between 1 and the number of experts" in text
    assert "config.json" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json must hold one JSON object"),
        (altered(hidden_size="abc"), "hidden_size = 'abc' in config.json: must be a whole number"),
        (altered(num_attention_heads=0), "num_attention_heads = 0 in config.json: must be a whole"),
        (altered(num_hidden_layers=-1), "num_hidden_layers = -1 in config.json: must be a whole"),
        (altered(vocab_size=True), "vocab_size = True in config.json: must be a whole number"),
        (altered(num_key_value_heads=3), "num_key_value_heads = 3 in config.json: must divide"),
        (altered(rms_norm_eps="small"), "rms_norm_eps"),
        (altered(hidden_act="gelu"), "hidden_act: 'gelu' in config.json is not supported"),
        (altered(rope_parameters={"rope_type": "spiral"}), "spiral"),
        (altered(rope_parameters=7), "config.json"),
    ],
)
def test_a_wrong_config_json_is_refused_by_checkpoint_and_field(tmp_path, text, message):
    assert message in refusal(tmp_path, text)


def test_a_wrong_kimi_k2_config_json_is_refused_by_field_too(tmp_path):
    settings = {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "own.Own"}}
    text = refusal(tmp_path, altered("deepseek-v3", **settings, n_routed_experts="8"))
    assert "n_routed_experts = '8' in config.json: must be a whole number" in text
    text = refusal(tmp_path, altered("deepseek-v3", **settings, num_experts_per_tok=1000))
    assert "num_experts_per_tok: 1000 must be between 1 and the number of experts" in text


def test_a_config_json_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(
        ValueError, match=r"model\.path = .*config\.json is not UTF-8 .byte 0 is 0xff"
    ):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "auto_map"),
    [("gpt2", ...), ("brand_new", ...), (..., ...), (7, ...), ("own", {"AutoConfig": "own.Own"})],
)
def test_a_model_type_without_a_family_is_refused_with_the_supported_ones(
    tmp_path, model_type, auto_map
):
    message = refusal(tmp_path, altered(model_type=model_type, auto_map=auto_map))
    named = "no model_type" if model_type is ... else f"model_type = {model_type!r}"
    assert named in message and all(name in message for name in supported_model_types())
