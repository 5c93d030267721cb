"""Fields of config.json: what each may hold, stated once.

`registry.py` checks the file with `check_fields` before transformers computes with it, the family
files read what transformers made of it with `read`, and `explain` turns what transformers raises
into the same sentence: the field, its value, what is allowed. No field is read in another way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_MOST = 2**31 - 1
_MOST_PARTS = 100_000  # layers, experts: a part of the model is built for each
_COMPARE = "; compare it with the published config.json"


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a field may hold; null is allowed or not where the field is read."""

    text: str  # completes the sentence "must be ..."
    holds: Callable[[Any], bool]


def _whole(low: int, high: int = _MOST) -> _Rule:
    text = f"a whole number from {low}" + (f" to {high}" if high < _MOST else "")
    return _Rule(text, lambda v: type(v) is int and low <= v <= high)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= _MOST


_EVEN = _Rule(  # the rotary embedding rotates pairs
    "an even whole number from 2", lambda v: type(v) is int and 2 <= v <= _MOST and v % 2 == 0
)
_POSITIVE = _Rule("a finite number above 0", lambda v: _is_number(v) and v > 0)
_SHARE = _Rule("a number above 0, at most 1", lambda v: _is_number(v) and 0 < v <= 1)
_NUMBER = _Rule("a finite number", _is_number)
_FLAG = _Rule("true or false", lambda v: type(v) is bool)
_TEXT = _Rule("text", lambda v: isinstance(v, str))
_LIST_OF_WHOLE = _Rule(
    "a list of whole numbers from 0",
    lambda v: isinstance(v, list) and all(_is_whole(item) and item >= 0 for item in v),
)
_LIST_OF_POSITIVE = _Rule(
    "a list of numbers above 0",
    lambda v: isinstance(v, list) and all(_is_number(item) and item > 0 for item in v),
)
_DTYPE = _Rule(
    "float32, bfloat16 or float16",
    lambda v: isinstance(v, str) and getattr(getattr(torch, v, None), "is_floating_point", False),
)
_OBJECT = _Rule("an object", lambda v: isinstance(v, Mapping))
_TOKEN_IDS = _Rule(
    "a token id or a list of them",
    lambda v: all(_is_whole(item) for item in (v if isinstance(v, list) else [v])),
)

_FIELDS = {
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
    # 0 in Qwen: every layer is dense. The others refuse it as fewer than num_experts_per_tok.
    **dict.fromkeys(("num_experts", "num_local_experts"), _whole(0, _MOST_PARTS)),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "rotary_dim"), _EVEN),
    "sliding_window": _Rule("a whole number", _is_whole),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "clip_qkv", "moe_norm_min"), _POSITIVE),
    **dict.fromkeys(("routed_scaling_factor", "swiglu_alpha", "swiglu_limit"), _POSITIVE),
    "partial_rotary_factor": _SHARE,
    **dict.fromkeys(
        (
            "attention_bias",
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
    **dict.fromkeys(("mlp_only_layers", "attn_type_list"), _LIST_OF_WHOLE),
    "layer_types": _Rule(
        "a list of text", lambda v: isinstance(v, list) and all(isinstance(i, str) for i in v)
    ),
    "moe_layer_freq": _Rule(
        "a whole number from 1, or a list of one number per layer",
        lambda v: (_is_whole(v) and v >= 1) or (isinstance(v, list) and all(map(_is_whole, v))),
    ),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "rope_parameters": _OBJECT,
    "rope_scaling": _OBJECT,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKEN_IDS),
}
# Of rope_parameters, which older configurations call rope_scaling. Where a type of scaling needs a
# field, it is not null there.
_ROPE_FIELDS = {
    "rope_type": _TEXT,
    "type": _TEXT,
    "rope_theta": _POSITIVE,
    "factor": _Rule("a finite number from 1", lambda v: _is_number(v) and v >= 1),
    "original_max_position_embeddings": _whole(1),
    "partial_rotary_factor": _SHARE,
    **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow"), _POSITIVE),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), _POSITIVE),
    "truncate": _FLAG,
    **dict.fromkeys(("mscale", "mscale_all_dim"), _NUMBER),
    **dict.fromkeys(("short_factor", "long_factor"), _LIST_OF_POSITIVE),
}
_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def check_fields(values: Mapping[str, Any]) -> None:
    """Check every known field that is present and not null.

    Args:
        values: the content of a config.json.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    for name, rule in _FIELDS.items():
        value = values.get(name)
        if value is not None and not rule.holds(value):
            raise _wrong(name, value, rule)
    for name in ("rope_scaling", "rope_parameters"):
        if (given := values.get(name)) is not None:
            _check_rope(name, given)
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise ValueError(
            f"num_key_value_heads = {kv_heads} in config.json: must divide num_attention_heads = "
            f"{heads}"
        )


def _check_rope(name: str, given: Mapping[str, Any]) -> None:
    needed = _ROPE_NEEDS.get(given.get("rope_type") or given.get("type") or "default", ())
    for key in needed:
        if given.get(key) is None:
            raise _wrong(f"{name}.{key}", None, _ROPE_FIELDS[key])
    for key, value in given.items():
        rule = _ROPE_FIELDS.get(key)
        if isinstance(value, Mapping):
            raise ValueError(
                f"{name}.{key} in config.json is an object: all layers of this engine's models "
                f"have one rotary embedding; must be fields such as rope_theta{_COMPARE}"
            )
        if value is not None and rule is not None and not rule.holds(value):
            raise _wrong(f"{name}.{key}", value, rule)


def check_rope(hf_config: Any, rotary_dim: int) -> None:
    """Check what transformers has made of the rotary embedding's fields.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    parameters = hf_config.rope_parameters
    if not isinstance(parameters, Mapping):
        raise _wrong("rope_parameters", parameters, _OBJECT)
    if not _POSITIVE.holds(parameters.get("rope_theta")):
        raise _wrong("rope_theta", parameters.get("rope_theta"), _POSITIVE)
    if not _EVEN.holds(rotary_dim):
        raise _wrong("head_dim (hidden_size / num_attention_heads)", rotary_dim, _EVEN)
    if parameters.get("rope_type") == "longrope":
        for key in ("short_factor", "long_factor"):
            if len(parameters[key]) != rotary_dim // 2:
                raise ValueError(
                    f"rope_parameters.{key} in config.json has {len(parameters[key])} numbers: "
                    f"must have {rotary_dim // 2}, one per rotated pair{_COMPARE}"
                )


def read(hf_config: Any, name: str) -> Any:
    """Return a field that the model needs.

    Args:
        hf_config: the transformers configuration.
        name: of the field, which has a rule above.

    Raises:
        ValueError: it is missing, null or wrong; naming the field, its value and what is allowed.
    """
    value = getattr(hf_config, name, None)
    if value is None or not _FIELDS[name].holds(value):
        raise _wrong(name, value, _FIELDS[name])
    return value


def read_optional(hf_config: Any, name: str) -> Any:
    """Return a field, None where it is missing or null; raise ValueError as `read` does."""
    return None if getattr(hf_config, name, None) is None else read(hf_config, name)


def read_flag(hf_config: Any, name: str, default: bool) -> bool:
    """Return a field that is true or false, `default` where it is missing or null."""
    value = read_optional(hf_config, name)
    return default if value is None else value


def explain(error: Exception, values: Mapping[str, Any]) -> str:
    """Return in words what transformers has raised while it read a config.json.

    Args:
        error: what it has raised.
        values: the content of the file.
    """
    why = " ".join(str(error).split())
    # Its own checks name the field and the expected type.
    if match := re.search(r"field '(\w+)'", why):
        name = match[1]
        if name in _FIELDS:
            return str(_wrong(name, values.get(name), _FIELDS[name]))
        types = dict.fromkeys(re.findall(r"expected (\w+), got", why))
        what = " or ".join(_WORDS.get(str(each), str(each)) for each in types)
        return str(_wrong(name, values.get(name), _Rule(what or "of another type", bool)))
    if "config.json" in why:
        return why
    kind = type(error).__name__
    why = re.sub(r"^.*\b\w+Error: ", "", why)  # of a validator of its own
    why = why if " " in why else f"{kind}: {why}"
    nulls = [name for name in _FIELDS if name in values and values[name] is None]
    hint = f" ({', '.join(nulls)} in it is null)" if nulls and "NoneType" in why else ""
    return (
        f"config.json describes no {values['model_type']} model{hint}{_COMPARE}; transformers "
        f"says: {why[:300]}"
    )


_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "an object",
    "NoneType": "null",
}


def _wrong(name: str, value: Any, rule: _Rule) -> ValueError:
    shown = "null" if value is None else repr(value)
    shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
    return ValueError(f"{name} = {shown} in config.json: must be {rule.text}{_COMPARE}")
