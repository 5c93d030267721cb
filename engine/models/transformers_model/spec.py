"""Spec: the `ModelSpec` of a model that transformers builds, for all that plans with one."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from engine.layers.attention import AttentionSpec
from engine.models.spec import DenseSpec, LayerSpec, ModelSpec, SparseSpec
from engine.models.transformers_model.probe import Probed, probe
from engine.moe.router import RouterSpec
from engine.moe.spec import MoESpec


def read_spec(hf_config: Any) -> ModelSpec:
    """Return the shapes of a configuration's model, as transformers builds it.

    Raises:
        ValueError: naming what of it this engine cannot serve.
    """
    return _spec_of(probed(hf_config), getattr(hf_config, "intermediate_size", None) or 1)


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


def _spec_of(found: Probed, dense_ffn: int) -> ModelSpec:
    sparse = {
        call.layer: SparseSpec(
            moe=MoESpec(
                router=RouterSpec(
                    num_experts=call.shape.num_experts, top_k=call.top_k, external=True
                ),
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
