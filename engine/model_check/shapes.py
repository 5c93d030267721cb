"""Shapes: a model's layers, attention and routing as fields of the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from engine.layers.attention import AttentionSpec
from engine.layers.gated_delta import GatedDeltaSpec
from engine.models.language_model import LanguageModel
from engine.models.model_types import family_module
from engine.models.spec import SparseSpec
from engine.models.transformers_model.model import TransformersModel


def describe_shapes(model: LanguageModel, hf_config: Any) -> dict[str, Any]:
    """Return the family and the shapes of a model."""
    spec = model.spec
    sparse = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, SparseSpec)]
    kinds = [layer.attention for layer in spec.layers]
    with_keys = [kind for kind in kinds if not isinstance(kind, GatedDeltaSpec)]
    attention = with_keys[0]
    windows = [getattr(layer.attention, "window", None) for layer in spec.layers]
    chunks = [getattr(layer.attention, "chunk", None) for layer in spec.layers]
    return {
        "family": _family(model, hf_config),
        "hidden": spec.hidden,
        "vocabulary": spec.vocab_size,
        "context": getattr(hf_config, "max_position_embeddings", None),
        "tied_embeddings": spec.tied_embeddings,
        "layers": {"dense": len(spec.layers) - len(sparse), "moe": len(sparse)},
        "attention": {
            "kind": "GQA" if isinstance(attention, AttentionSpec) else "MLA",
            **_fields(attention),
            "window": next((window for window in windows if window), None),
            "window_layers": sum(window is not None for window in windows),
            "chunk": next((chunk for chunk in chunks if chunk), None),
            "chunk_layers": sum(chunk is not None for chunk in chunks),
            "state_layers": len(kinds) - len(with_keys),
        },
        "rope": _rope(hf_config),
        "experts": _experts(sparse),
    }


def _family(model: LanguageModel, hf_config: Any) -> str:
    """Return the module that reads the configuration, or transformers' class."""
    if isinstance(model, TransformersModel):
        return f"{type(model.causal).__name__} of transformers"
    return family_module(hf_config.model_type)


def _rope(hf_config: Any) -> str:
    """Return the type of the rotary embedding; where kinds of layers have their own, all types."""
    rope = getattr(hf_config, "rope_parameters", None) or {}
    kinds = [each for each in rope.values() if isinstance(each, Mapping)] or [rope]
    return ", ".join(sorted({str(each.get("rope_type") or "default") for each in kinds}))


def _experts(sparse: list[SparseSpec]) -> dict[str, Any] | None:
    if not sparse:
        return None
    first = sparse[0]
    top_k = {mlp.moe.router.top_k for mlp in sparse}
    return {
        "ffn": first.moe.ffn,
        "form": first.moe.experts.words,
        "shared_ffn": None if first.shared is None else first.shared.ffn,
        **_fields(first.moe.router),
        "top_k": max(top_k),
        "least_top_k": min(top_k),
    }


def _fields(spec: Any) -> dict[str, Any]:
    """Return the plain values of a spec."""
    plain = (int, float, str, bool, type(None))
    return {key: value for key, value in asdict(spec).items() if isinstance(value, plain)}
