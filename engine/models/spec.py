"""What a family file says about a model: shapes, routing and names, without tensors.

Each family file turns a Hugging Face configuration into a `ModelSpec`; `decoder.py` builds the
modules from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.layers.attention import AttentionSpec
from engine.layers.mla import MLASpec
from engine.moe.layer import MoESpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSpec:
    """A dense feed-forward. ffn: its hidden dim. bias: on its three projections."""

    ffn: int
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseSpec:
    """A Mixture-of-Experts feed-forward. shared: the expert that every token passes, or None.

    shared_gate: the shared expert's output is multiplied by a sigmoid of the token (Qwen2-MoE).
    """

    moe: MoESpec
    shared: DenseSpec | None = None
    shared_gate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer."""

    attention: AttentionSpec | MLASpec
    mlp: DenseSpec | SparseSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class MoENames:
    """Where a family's checkpoints keep an MoE layer, relative to model.layers.{i}.

    block: its prefix. w1, w3, w2: gate, up and down projection of one expert. Transformers' own
    names in memory (mlp.gate.weight, mlp.experts.gate_up_proj, mlp.experts.down_proj) are always
    accepted as well.
    """

    block: str = "mlp"
    w1: str = "gate_proj"
    w3: str = "up_proj"
    w2: str = "down_proj"
    shared: str = "shared_experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole model.

    rotary_dim: dims of a head that turn. ignored: regular expressions of tensors nobody needs.
    """

    vocab_size: int
    hidden: int
    norm_eps: float
    tied_embeddings: bool
    rotary_dim: int
    layers: tuple[LayerSpec, ...]
    names: MoENames = MoENames()
    ignored: tuple[str, ...] = ()


def check_config(hf_config: Any) -> None:
    """Refuse what no family here can run.

    Raises:
        ValueError: naming the field of config.json, its value and the rule.
    """
    if hf_config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act: {hf_config.hidden_act!r} in config.json is not supported, only 'silu': "
            "the experts' kernels compute silu(gate) * up"
        )
    if getattr(hf_config, "quantization_config", None) is not None:
        raise ValueError(
            "quantization_config in config.json: quantized checkpoints are not supported; use one "
            "in float32, bfloat16 or float16"
        )


def require(hf_config: Any, field: str) -> Any:
    """Return a field that a configuration may carry as null but this model needs.

    Raises:
        ValueError: when it is null.
    """
    value = getattr(hf_config, field, None)
    if value is None:
        raise ValueError(f"{field} in config.json is null; this model type needs a number there")
    return value
