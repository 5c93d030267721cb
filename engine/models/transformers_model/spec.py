"""Spec: the `ModelSpec` of a model that transformers builds, for all that plans with one."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from engine.layers.attention import AttentionSpec
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, SparseSpec
from engine.models.transformers_model.layer_calls import ExpertsCall, Probed
from engine.models.transformers_model.probe import probe
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Return the shapes of a configuration's model, as transformers builds it.

    Raises:
        ValueError: naming what of it this engine cannot serve.
    """
    return _spec_of(probed(hf_config), hf_config)


def scores_of(hf_config: Any) -> str:
    """Return, in words, which router scores capacity has for a configuration's model.

    Raises:
        ValueError: naming what of it this engine cannot serve.
    """
    calls = probed(hf_config).experts
    unknown = [str(call.layer) for call in calls if call.scores is None]
    if not unknown:
        return "scores of all experts: token_drop and expanded_drop, by score"
    where = "" if len(unknown) == len(calls) else f" in layers {', '.join(unknown)}"
    return (
        f"combine weights of the chosen experts alone{where}: token_drop, by combine weight; no "
        "expanded_drop"
    )


def probed(hf_config: Any) -> Probed:
    """Return what a configuration's model asks for; the same configuration is probed once."""
    return _probed(_Key(hf_config))


class _Key:
    """A configuration as a key: equal where its text is."""

    def __init__(self, hf_config: Any) -> None:
        self.hf_config, self._text = hf_config, hf_config.to_json_string(use_diff=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@lru_cache(maxsize=4)
def _probed(key: _Key) -> Probed:
    return probe(key.hf_config)


def _router_of(call: ExpertsCall, model_type: str) -> RouterSpec:
    """Return a router whose choice is transformers', with the rule of its scores if it is known."""
    external = f"model_type {model_type!r}, which transformers builds,"
    num_experts, top_k, scores = call.shape.num_experts, call.top_k, call.scores
    if scores is None:
        return RouterSpec(
            num_experts=num_experts, top_k=top_k, external=external, scores_known=False
        )
    return RouterSpec(
        num_experts=num_experts,
        top_k=top_k,
        score=scores.score,
        normalize=scores.normalize,
        normalize_eps=scores.normalize_eps,
        normalize_min=scores.normalize_min,
        scale=scores.scale,
        external=external,
    )


def _spec_of(found: Probed, hf_config: Any) -> ModelSpec:
    dense_ffn = getattr(hf_config, "intermediate_size", None) or 1
    sparse = {
        call.layer: SparseSpec(
            moe=MoESpec(
                router=_router_of(call, hf_config.model_type),
                hidden=call.shape.hidden,
                ffn=call.shape.ffn,
                experts=call.shape.form,
            )
        )
        for call in found.experts
    }
    layers = [
        LayerSpec(
            attention=AttentionSpec(
                hidden=found.hidden,
                num_heads=call.num_heads,
                num_kv_heads=call.num_kv_heads,
                head_dim=call.key_dim,
                window=call.window,
            ),
            mlp=sparse.get(layer, DenseSpec(ffn=dense_ffn)),
        )
        for layer, call in enumerate(found.attention)
    ]
    return ModelSpec(
        vocab_size=found.vocab_size,
        hidden=found.hidden,
        norm_eps=1e-6,  # transformers' own modules have the checkpoint's
        tied_embeddings=found.tied_embeddings,
        rotary_dim=found.attention[0].key_dim,
        layers=tuple(layers),
    )
