"""Layer calls: what the layers of transformers' model ask of this engine, found by `probe.py`."""

from __future__ import annotations

from dataclasses import dataclass

from engine.layers.attention_backends.backend import AttentionKind
from engine.models.transformers_model.router_scores import RouterScores
from engine.moe.stacked_experts import StackedExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """How one layer attends."""

    path: str  # of the module
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None

    @property
    def kind(self) -> AttentionKind:
        """As attention backends ask for it."""
        return AttentionKind(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            scale=None,
            window=self.window,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsCall:
    """How one layer calls its experts."""

    path: str  # of the module
    layer: int
    top_k: int
    shape: StackedExperts
    scores: RouterScores | None = None  # None: the router's combine weights alone are known


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What a model asks for."""

    attention: tuple[AttentionCall, ...]  # of every layer in order
    experts: tuple[ExpertsCall, ...]  # in the order in which they are called
    hidden: int
    vocab_size: int
    tied_embeddings: bool
