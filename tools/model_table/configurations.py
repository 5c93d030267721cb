"""Configurations: a configuration of every model type with experts, found in transformers.

Model types are those of transformers' own mapping of configurations, and those that this engine
alone reads. The configuration is that of the first parity test of the type (`tests/models`), else
the default of transformers' class.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # engine, tests
from engine.models.model_types import read_as, supported_model_types
from tests.helpers.model_cases import CASES
from tests.helpers.seeing_cases import SEEING_CASES
from tests.helpers.transformers_cases import FOREIGN_CASES

# What the default configuration of a class leaves out, or has otherwise than any published model.
_FILLED: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8}},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
}


@dataclass(frozen=True, slots=True)
class Configuration:
    """A configuration, and which parity tests there are of its model type."""

    model_type: str
    hf_config: Any
    cases: tuple[str, ...] = ()  # names of the tests' cases; empty: it is the default


def configurations() -> list[Configuration]:
    """Return a configuration of every model type with experts, by name of the model type."""
    from transformers import CONFIG_MAPPING

    cases: dict[str, list[str]] = {}
    first: dict[str, Any] = {}
    for name, case in {**CASES, **FOREIGN_CASES}.items():
        config = case.config()
        cases.setdefault(config.model_type, []).append(name)
        first.setdefault(config.model_type, config)
    for name, case in SEEING_CASES.items():
        for config in (case.config(), case.config().text_config):
            if name not in cases.setdefault(config.model_type, []):
                cases[config.model_type].append(name)
            first.setdefault(config.model_type, config)
    found = []
    for model_type in sorted({*CONFIG_MAPPING.keys(), *supported_model_types()}):
        known = model_type if model_type in CONFIG_MAPPING else read_as(model_type)
        config = first.get(known) or _default(CONFIG_MAPPING[known], model_type)
        if config is not None and has_experts(config):
            # A model type that is read as another one is tested as that.
            tested = cases.get(model_type) or cases.get(read_as(model_type), [])
            found.append(Configuration(model_type, config, tuple(tested)))
    return found


def has_experts(hf_config: Any) -> bool:
    """Return whether a configuration, or one of its parts, has a field about experts."""
    parts = [getattr(hf_config, name, None) for name in getattr(hf_config, "sub_configs", ())]
    return any(_names_experts(part) for part in (hf_config, *parts) if part is not None)


def _names_experts(config: Any) -> bool:
    names = vars(config).keys() | getattr(config, "attribute_map", {}).keys()
    return any("expert" in name and not name.startswith("_") for name in names)


def _default(kind: Any, model_type: str) -> Any:
    """Return the default configuration of a class; None where the class has none."""
    try:
        config = kind(**_FILLED.get(model_type, {}))
    except Exception:  # a class that asks for parts of its own
        return None
    if not getattr(config, "architectures", None) and has_experts(config):
        config.architectures = _architectures(config)
    return config


def _architectures(config: Any) -> list[str] | None:
    """Return the causal language models of a configuration's class, as config.json names them."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    found = [
        each
        for each in sorted(vars(module))
        if each.endswith("ForCausalLM") and _reads(vars(module)[each], config)
    ]
    return found or None


def _reads(model: Any, config: Any) -> bool:
    return getattr(model, "config_class", None) is type(config)
