"""Work: what one rank reads, computes, sends and launches in a step, from the model's shapes.

The model is built on torch's meta device as that rank would build it, so that bytes are those of
the engine's own weights. Experts are read as far as evenly routed tokens choose them; rows are even
over ranks but for a factor that the caller gives.

Legend: T tokens of the step on each rank, W expert-parallel ranks, K experts per token, D model
dim, F hidden dim of an expert.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from engine.layers.attention import AttentionSpec
from engine.layers.decode_inputs import bucket_of
from engine.layers.gated_delta import GatedDeltaSpec
from engine.layers.mla import MLASpec
from engine.model_check.stored_tensors import part_finder
from engine.models.language_model import LanguageModel

PARTS: tuple[str, ...] = (
    "attention",
    "keys and values",
    "experts",
    "rows",
    "router, shared, dense",
    "head",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a rank has to do in a step."""

    ranks: int  # W
    sequences: int  # per rank
    queries: int  # tokens per sequence: 1 in decode
    context: int  # tokens of a sequence behind the step
    tensor: int = 1  # ranks that share attention heads
    imbalance: float = 1.0  # rows of the most loaded rank over the mean
    partial_sums: bool = False  # moe.dispatch.partial_sums: one row home per token and rank

    @property
    def tokens(self) -> int:
        """T."""
        return self.sequences * self.queries


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of memory and operations."""

    memory: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Part) -> Part:
        return Part(self.memory + other.memory, self.flops + other.flops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One step of the most loaded rank."""

    parts: dict[str, Part]
    weight_bytes: int  # that the rank holds
    num_layers: int
    num_moe_layers: int
    sent: float  # bytes to other ranks over the step, in one direction, as rows are counted
    static_sent: float | None  # the same by the static exchange; None: too many tokens for it
    reduced: float  # bytes of tensor ranks' sums that leave this rank


def work_of(model: LanguageModel, load: Load, names: Collection[str] = ()) -> Work:
    """Return the work of a step on the rank that a model was built for.

    Args:
        model: on the meta device.
        load: of the step.
        names: of the checkpoint's tensors.
    """
    item = model.dtype.itemsize
    parts: dict[str, Part] = dict.fromkeys(PARTS, Part())
    held, find = 0, part_finder(model, names)
    head = embedding = None
    expert_bytes: dict[str, int] = {}
    for slot in model.weight_slots(names):
        if slot.tied_to is not None:
            continue
        held += slot.num_bytes
        kind = find(slot.name)
        if kind == "embedding, head":
            is_head = slot.name.startswith("lm_head")
            head, embedding = (slot, embedding) if is_head else (head, slot)
        elif kind == "experts":
            layer = slot.name.partition(".experts.")[0]
            expert_bytes[layer] = expert_bytes.get(layer, 0) + slot.num_bytes
        else:
            name = "attention" if kind == "attention" else "router, shared, dense"
            flops = 2 * load.tokens * slot.target.numel() if slot.kind == "matrix" else 0
            parts[name] += Part(slot.num_bytes, flops)
    last = head or embedding  # tied: the head is the embedding
    if last is not None:
        parts["head"] = Part(last.num_bytes, 2 * load.sequences * last.target.numel())
    for layer in model.spec.layers:
        parts["keys and values"] += _attention(layer.attention, load, item)
    sent = static_sent = 0.0
    bucket = bucket_of(load.tokens)
    for layer, stored in zip(model.moe_layers, expert_bytes.values(), strict=True):
        spec = layer.spec
        router, width = spec.router, spec.width
        top_k = router.top_k * router.num_experts / router.num_logits  # zero experts are no rows
        group_tokens = load.tokens * load.ranks // load.tensor
        local = layer.experts.num_homes
        chosen = 1 - (1 - top_k / router.num_experts) ** group_tokens
        mean = group_tokens * top_k * local / router.num_experts
        rows = mean * (load.imbalance if load.ranks > 1 else 1.0)
        matrices = 3 if spec.experts.gated else 2
        flops = 2 * rows * matrices * width * spec.ffn
        parts["experts"] += Part(stored * chosen, flops)
        # Gathered, read, written and combined; the experts' hidden rows written and read.
        moved = rows * item * (5 * width + 2 * matrices * spec.ffn)
        parts["rows"] += Part(moved)
        away = 1 - 1 / load.ranks
        home = rows
        if load.partial_sums:  # at most one per token of the group, and no more than were sent
            home = min(rows, group_tokens * (1 - (1 - local / router.num_experts) ** top_k))
        sent += (rows + home) * away * width * item
        # All rows of the bucket to every rank, and a place home for each result there may be.
        places = 2 if load.partial_sums else 1 + min(router.top_k, local)
        static_sent += (load.ranks - 1) * (bucket or 0) * places * width * item
    sums = 2 * (load.tensor - 1) / load.tensor * load.tokens * model.spec.hidden * item
    return Work(
        parts=parts,
        weight_bytes=held,
        num_layers=len(model.spec.layers),
        num_moe_layers=len(model.moe_layers),
        sent=sent,
        static_sent=static_sent if bucket else None,
        reduced=sums * len(model.spec.layers),
    )


def _attention(spec: AttentionSpec | MLASpec | GatedDeltaSpec, load: Load, item: int) -> Part:
    """Return the work of attention itself, without its projections."""
    if isinstance(spec, GatedDeltaSpec):
        heads = spec.num_value_heads / load.tensor
        state = heads * spec.key_dim * spec.value_dim
        # The state, in float32, read and written once; decay, product, update, output per token.
        return Part(load.sequences * 8 * state, 8 * load.tokens * state)
    total = load.context + load.queries
    if isinstance(spec, MLASpec):  # absorbed: one key of this width for all heads
        width, heads = spec.kv_rank + spec.rope_dim, spec.num_heads / load.tensor
        cached, scored = width, heads * (width + spec.kv_rank)
    else:
        heads = spec.num_heads / load.tensor
        cached = 2 * max(1.0, spec.num_kv_heads / load.tensor) * spec.head_dim
        scored = heads * 2 * spec.head_dim
    reach = (
        min(total, spec.window or total, spec.chunk or total)
        if isinstance(spec, AttentionSpec)
        else total
    )
    # Keys before each of the queries; none looks at later ones.
    first = load.context + 1
    pairs = sum(min(reach, first + query) for query in range(load.queries))
    memory = load.sequences * item * cached * (min(total, reach + load.queries) + load.queries)
    return Part(memory, 2 * load.sequences * pairs * scored)
