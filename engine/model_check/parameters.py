"""Parameters: how many a model has, and how many of them a token uses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from engine.model_check.stored_tensors import part_of
from engine.models.language_model import LanguageModel
from engine.weights.slot import WeightSlot

_OF_EXPERTS, _REST = ("experts", "shared experts", "router"), "shared, dense"


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts of numbers, without scales and other numbers that quantisation adds."""

    total: int
    active: int  # of them per token: without experts that it does not choose, and of the embedding
    # one row; where the head is the embedding, all of it
    active_with_embedding: int  # the same with the whole embedding, as some publishers count
    parts: Mapping[str, int]  # of the total: routed and shared experts, router


def count_parameters(
    model: LanguageModel, slots: Sequence[WeightSlot], find_part: Callable[[str], str] = part_of
) -> Parameters:
    """Return the counts of a model on one rank, its experts in the model's dtype.

    Args:
        model: it.
        slots: all of the model.
        find_part: of a slot by its name.
    """
    parts: Counter[str] = Counter()
    for slot in slots:
        if slot.tied_to is None:
            shared = "shared" in slot.name.rpartition("layers.")[2]
            part = find_part(slot.name)
            parts["shared experts" if shared and part == _REST else part] += slot.target.numel()
    total = parts.total()
    idle = Fraction(0)
    for layer in model.moe_layers:
        router, experts = layer.spec.router, layer.experts
        # Of a mean token: zero experts take their share of its choices.
        chosen = Fraction(router.top_k * router.num_experts, router.num_logits)
        each = experts.copy_size // experts.stacked.w13_e2FD.element_size()
        idle += (router.num_experts - chosen) * each
    other_rows = 0 if model.spec.tied_embeddings else (model.vocab_size - 1) * model.spec.hidden
    active = total - int(idle)
    of_experts = {part: parts[part] for part in _OF_EXPERTS}
    return Parameters(total, active - other_rows, active, of_experts)
