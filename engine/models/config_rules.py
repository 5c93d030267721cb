"""Config rules: what each field of config.json may hold, stated once; see `config_fields.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_MOST = 2**31 - 1
_MOST_PARTS = 100_000  # layers, experts: a part of the model is built for each


@dataclass(frozen=True, slots=True)
class Rule:
    """What a field may hold; null is allowed or not where the field is read."""

    text: str  # completes the sentence "must be ..."
    holds: Callable[[Any], bool]


def _whole(low: int, high: int = _MOST) -> Rule:
    text = f"a whole number from {low}" + (f" to {high}" if high < _MOST else "")
    return Rule(text, lambda v: type(v) is int and low <= v <= high)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= _MOST


EVEN = Rule(  # the rotary embedding rotates pairs
    "an even whole number from 2", lambda v: type(v) is int and 2 <= v <= _MOST and v % 2 == 0
)
POSITIVE = Rule("a finite number above 0", lambda v: _is_number(v) and v > 0)
_SHARE = Rule("a number above 0, at most 1", lambda v: _is_number(v) and 0 < v <= 1)
_NUMBER = Rule("a finite number", _is_number)
_FLAG = Rule("true or false", lambda v: type(v) is bool)
_TEXT = Rule("text", lambda v: isinstance(v, str))
_LIST_OF_WHOLE = Rule(
    "a list of whole numbers from 0",
    lambda v: isinstance(v, list) and all(_is_whole(item) and item >= 0 for item in v),
)
_LIST_OF_POSITIVE = Rule(
    "a list of numbers above 0",
    lambda v: isinstance(v, list) and all(_is_number(item) and item > 0 for item in v),
)
_DTYPE = Rule(
    "float32, bfloat16 or float16",
    lambda v: isinstance(v, str) and getattr(getattr(torch, v, None), "is_floating_point", False),
)
OBJECT = Rule("an object", lambda v: isinstance(v, Mapping))
_TOKEN_IDS = Rule(
    "a token id or a list of them",
    lambda v: all(_is_whole(item) for item in (v if isinstance(v, list) else [v])),
)

FIELDS = {
    **dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "vocab_size",
            "max_position_embeddings",
            "num_attention_heads",
            "num_key_value_heads",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
            "decoder_sparse_step",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "v_head_dim",
            "moe_k",
            "moe_layer_interval",
            "intermediate_size_mlp",
            "attention_chunk_size",
            "floor_scale",
            "interleave_moe_layer_step",
            "no_rope_layer_interval",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "moe_topk",
            "ffn_hidden_size",
            "expert_ffn_hidden_size",
        ),
        _whole(1),
    ),
    **dict.fromkeys(
        (
            "n_shared_experts",
            "shared_expert_intermediate_size",
            "first_k_dense_replace",
            "max_window_layers",
            "moe_num_shared_experts",
            "moe_layer_start_index",
            "zero_expert_num",
        ),
        _whole(0),
    ),
    **dict.fromkeys(("num_hidden_layers", "num_layers"), _whole(1, _MOST_PARTS)),
    **dict.fromkeys(("n_routed_experts", "moe_num_experts"), _whole(1, _MOST_PARTS)),
    "moe_layer_end_index": _whole(-1),
    "linear_conv_kernel_dim": _whole(2),  # taps: the token's own, and of those before it
    # 0 in Qwen: every layer is dense. The others refuse it as fewer than num_experts_per_tok.
    **dict.fromkeys(("num_experts", "num_local_experts"), _whole(0, _MOST_PARTS)),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "rotary_dim"), EVEN),
    "sliding_window": Rule("a whole number", _is_whole),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "clip_qkv", "moe_norm_min"), POSITIVE),
    **dict.fromkeys(("routed_scaling_factor", "swiglu_alpha", "swiglu_limit"), POSITIVE),
    "partial_rotary_factor": _SHARE,
    **dict.fromkeys(
        (
            "attention_bias",
            "attn_temperature_tuning",
            "mla_scale_kv_lora",
            "mla_scale_q_lora",
            "mlp_bias",
            "norm_topk_prob",
            "qkv_bias",
            "rope_interleave",
            "router_bias",
            "tie_word_embeddings",
            "use_bias",
            "use_qk_norm",
            "use_sliding_window",
        ),
        _FLAG,
    ),
    **dict.fromkeys(
        ("hidden_act", "model_type", "scoring_func", "topk_method", "zero_expert_type"), _TEXT
    ),
    **dict.fromkeys(
        ("mlp_only_layers", "attn_type_list", "moe_layers", "no_rope_layers"), _LIST_OF_WHOLE
    ),
    "attn_scale": _NUMBER,
    "layer_types": Rule(
        "a list of text", lambda v: isinstance(v, list) and all(isinstance(i, str) for i in v)
    ),
    "moe_layer_freq": Rule(
        "a whole number from 1, or a list of one number per layer",
        lambda v: (_is_whole(v) and v >= 1) or (isinstance(v, list) and all(map(_is_whole, v))),
    ),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKEN_IDS),
}
# Of rope_parameters, which older configurations call rope_scaling. Where a type of scaling needs a
# field, it is not null there.
ROPE_FIELDS = {
    "rope_type": _TEXT,
    "type": _TEXT,
    "rope_theta": POSITIVE,
    "factor": Rule("a finite number from 1", lambda v: _is_number(v) and v >= 1),
    "original_max_position_embeddings": _whole(1),
    "partial_rotary_factor": _SHARE,
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow"), POSITIVE),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), POSITIVE),
    "truncate": _FLAG,
    **dict.fromkeys(("mscale", "mscale_all_dim"), _NUMBER),
    **dict.fromkeys(("short_factor", "long_factor"), _LIST_OF_POSITIVE),
}
ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
