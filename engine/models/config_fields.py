"""Fields of config.json, checked and read by the rules in `config_rules.py`.

`registry.py` checks the file with `check_fields` before transformers computes with it, the family
files read what transformers made of it with `read`, and `explain` turns what transformers raises
into the same sentence: the field, its value, what is allowed. No field is read in another way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from engine.models.config_rules import (
    EVEN,
    FIELDS,
    OBJECT,
    POSITIVE,
    ROPE_FIELDS,
    ROPE_NEEDS,
    Rule,
)

_COMPARE = "; compare it with the published config.json"


def check_fields(values: Mapping[str, Any]) -> None:
    """Check every known field that is present and not null.

    Args:
        values: the content of a config.json.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    for name, rule in FIELDS.items():
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
    needed = ROPE_NEEDS.get(given.get("rope_type") or given.get("type") or "default", ())
    for key in needed:
        if given.get(key) is None:
            raise _wrong(f"{name}.{key}", None, ROPE_FIELDS[key])
    for key, value in given.items():
        rule = ROPE_FIELDS.get(key)
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
        raise _wrong("rope_parameters", parameters, OBJECT)
    if not POSITIVE.holds(parameters.get("rope_theta")):
        raise _wrong("rope_theta", parameters.get("rope_theta"), POSITIVE)
    if not EVEN.holds(rotary_dim):
        raise _wrong("head_dim (hidden_size / num_attention_heads)", rotary_dim, EVEN)
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
        name: of the field, which has a rule in `config_rules.py`.

    Raises:
        ValueError: it is missing, null or wrong; naming the field, its value and what is allowed.
    """
    value = getattr(hf_config, name, None)
    if value is None or not FIELDS[name].holds(value):
        raise _wrong(name, value, FIELDS[name])
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
        if name in FIELDS:
            return str(_wrong(name, values.get(name), FIELDS[name]))
        types = dict.fromkeys(re.findall(r"expected (\w+), got", why))
        what = " or ".join(_WORDS.get(str(each), str(each)) for each in types)
        return str(_wrong(name, values.get(name), Rule(what or "of another type", bool)))
    if "config.json" in why:
        return why
    kind = type(error).__name__
    why = re.sub(r"^.*\b\w+Error: ", "", why)  # of a validator of its own
    why = why if " " in why else f"{kind}: {why}"
    nulls = [name for name in FIELDS if name in values and values[name] is None]
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


def _wrong(name: str, value: Any, rule: Rule) -> ValueError:
    shown = "null" if value is None else repr(value)
    shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
    return ValueError(f"{name} = {shown} in config.json: must be {rule.text}{_COMPARE}")
