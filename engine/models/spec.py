"""Model spec: a model's shapes, routing and tensor names, without tensors.

Each family file (`families/`) turns a Hugging Face configuration into a `ModelSpec`, with the
helpers of `hf_config.py`; `decoder.py` builds the modules from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.layers.attention import AttentionSpec
from engine.layers.gated_delta import GatedDeltaSpec
from engine.layers.mla import MLASpec
from engine.moe.spec import MoESpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSpec:
    """A dense feed-forward."""

    ffn: int  # hidden dim
    bias: bool = False  # on its three projections


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseSpec:
    """A Mixture-of-Experts feed-forward."""

    moe: MoESpec
    shared: DenseSpec | None = None  # the shared expert, which runs on every token
    shared_gate: bool = False  # multiply its output by a sigmoid of the token (Qwen2-MoE)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer."""

    attention: AttentionSpec | MLASpec | GatedDeltaSpec
    mlp: DenseSpec | SparseSpec
    # Run parallel to a sparse `mlp`, on the same input: its result is the layer's, and that of the
    # experts is added to the next layer's, which is dense (the shortcut of LongCat-Flash).
    parallel_dense: DenseSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoENames:
    """Names of an MoE layer's tensors in a family's checkpoints.

    Transformers' own names in memory (mlp.gate.weight, mlp.experts.gate_up_proj,
    mlp.experts.down_proj) are always accepted as well.
    """

    block: str = "mlp"  # the layer's prefix below model.layers.{i}
    w1: str = "gate_proj"  # projections of one expert
    w3: str = "up_proj"
    w2: str = "down_proj"
    shared: str = "shared_experts"
    gate: str = "gate"  # the router, whose weight and, where it has one, bias are below it
    latent: tuple[str, str] = ("fc1_latent_proj", "fc2_latent_proj")  # to latent rows, and back
    bias: str = "gate.e_score_correction_bias"  # of the choice, below the block
    # Whether experts are stacked as gpt-oss stores them: rows of gate and up alternate, and
    # matrices that are not quantised are transposed.
    alternating: bool = False
    # Whether experts that are stacked have their matrices transposed (Llama 4).
    transposed: bool = False
    expert_scale: str = "gate.per_expert_scale"  # of the combine weights, below the block
    table: str = "gate.tid2eid"  # the experts of each token id, below the block
    bias_rows: int | None = None  # a first dimension of 1 of the bias (ERNIE-4.5); None: none


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole model."""

    vocab_size: int
    hidden: int
    norm_eps: float  # of the layers' RMS norms and the final one
    norm_offset: float = 0.0  # added to the weights of these norms as they are read
    tied_embeddings: bool  # the head is the embedding
    rotary_dim: int  # rotated dims of a head
    layers: tuple[LayerSpec, ...]
    names: MoENames = MoENames()
    # Layers here per layer of the checkpoint, which numbers their norms, attention and dense MLPs.
    sublayers: int = 1
    ignored: tuple[str, ...] = ()  # regular expressions of checkpoint tensors that are not needed
    # Whether layers past the last may be multi-token prediction heads, which are not needed.
    mtp_layers: bool = False

    def __post_init__(self) -> None:
        """Check the tables of token ids.

        Raises:
            ValueError: one has no row for some token id.
        """
        for index, layer in enumerate(self.layers):
            if not isinstance(layer.mlp, SparseSpec):
                continue
            rows = layer.mlp.moe.router.token_table
            if rows is not None and rows < self.vocab_size:
                raise ValueError(
                    f"vocab_size: {self.vocab_size} exceeds the {rows} rows of layer {index}'s "
                    "table of token ids; check the checkpoint's config.json"
                )

    def prefix(self, layer: int) -> tuple[str, str]:
        """Return a layer's name in the checkpoint, as in model.layers.0, and what comes behind the
        names of its norms, attention and dense MLP, as in .1 or nothing.
        """
        number, part = divmod(layer, self.sublayers)
        return f"model.layers.{number}", f".{part}" if self.sublayers > 1 else ""
