"""Decoder slots: which checkpoint tensors fill the decoder of `decoder.py`, as `WeightSlot`s.

Those of an MoE layer are in `expert_weights.py`.

Legend: D model dim, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from engine.models.checkpoint_buffers import BUFFERS
from engine.models.decoder_layer import DecoderLayer
from engine.models.expert_weights import moe_slots
from engine.models.spec import ModelSpec
from engine.moe.layer import MoELayer
from engine.weights.slot import WeightSlot

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def decoder_slots(
    spec: ModelSpec,
    layers: Sequence[DecoderLayer],
    *,
    embedding_VD: torch.Tensor,
    head_VD: torch.Tensor,
    final_norm_D: torch.Tensor,
    untie: Callable[[], torch.Tensor],
    checkpoint: Collection[str],
) -> Iterator[WeightSlot]:
    """Yield a slot for every checkpoint tensor that this rank needs.

    A checkpoint whose head is tied may hold it under the name of the embedding, of the head, or
    under both; if they differ, `load_weights` unties the head.

    Args:
        spec: of the model.
        layers: its layers on this rank.
        embedding_VD, head_VD: in the dtype of the weights; the same tensor where they are tied.
        final_norm_D: of the norm after the last layer.
        untie: gives the head memory of its own and returns it.
        checkpoint: names of the tensors in the checkpoint; they decide whether experts are read
            one by one or stacked, and which tensor fills a tied head.
    """
    shape, tied, offset = (spec.vocab_size, spec.hidden), spec.tied_embeddings, spec.norm_offset
    yield WeightSlot(_EMBEDDING, embedding_VD, shape, aliases=(_HEAD,) if tied else ())
    for index, layer in enumerate(layers):
        prefix, part = spec.prefix(index)
        dense = f"{prefix}.mlps{part}" if part else f"{prefix}.{spec.names.block}"
        for name, norm_D in (
            ("input_layernorm", layer.input_norm_D),
            ("post_attention_layernorm", layer.mlp_norm_D),
        ):
            yield _norm_slot(f"{prefix}.{name}{part}.weight", norm_D, offset)
        yield from layer.attention.weight_slots(f"{prefix}.{layer.attention_name}{part}")
        if isinstance(layer.mlp, MoELayer):
            yield from moe_slots(layer.mlp, prefix, spec.names, checkpoint)
        else:
            yield from layer.mlp.weight_slots(dense)
        if layer.parallel_dense is not None:
            yield from layer.parallel_dense.weight_slots(dense)
    yield _norm_slot("model.norm.weight", final_norm_D, offset)
    if not tied:
        yield WeightSlot(_HEAD, head_VD, shape)
    elif _HEAD in checkpoint and _EMBEDDING in checkpoint:
        yield WeightSlot(_HEAD, embedding_VD, shape, tied_to=_EMBEDDING, untie=untie)


def ignored_tensors(spec: ModelSpec, checkpoint: Collection[str]) -> tuple[str, ...]:
    """Return regular expressions of checkpoint tensors that no rank needs.

    Args:
        spec: of the model.
        checkpoint: names of the tensors in the checkpoint; they decide which layers past the last
            one are multi-token prediction heads.
    """
    found = (re.fullmatch(r"model\.layers\.(\d+)\.eh_proj\.weight", name) for name in checkpoint)
    layers = sorted({int(match[1]) for match in found if match} if spec.mtp_layers else ())
    heads = [rf"^model\.layers\.{n}\." for n in layers if n >= len(spec.layers)]
    return (*BUFFERS, *spec.ignored, *heads)


def _norm_slot(name: str, target: torch.Tensor, offset: float) -> WeightSlot:
    return WeightSlot(name, target, tuple(target.shape), kind="norm", offset=offset)
