"""Rank share: what a rank of so many holds, in bytes, worked out from the model without its memory.

The model is built on torch's meta device, as a rank would build it, for groups that do not exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import torch

from engine.config import CapacityConfig, Config, ModelConfig, SchedulerConfig
from engine.distributed.groups import Group, Topology, expert_range
from engine.generation.memory import CUDA_SHARE, MoEShape, row_bound
from engine.model_check.stored_tensors import part_of
from engine.models.decoder import CausalLM
from engine.models.registry import build_model

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class RankShare:
    """The rank that holds most of a model on so many ranks; or why it does not run on them."""

    ranks: int
    problem: str = ""
    experts: tuple[int, int] = (0, 0)  # per layer, of the rank that has fewest and of it
    part_bytes: Mapping[str, int] | None = None  # in the model's dtype
    stored_bytes: int = 0  # of the same weights as the files have them
    row_bytes: int = 0  # of what is kept for rows of MoE layers, at the default settings
    kv_bytes: int = 0  # per token
    state_bytes: int = 0  # of recurrent states, per sequence
    kv_tokens: Mapping[float, int] | None = None  # GiB of a GPU -> tokens; 0: no room

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, in the model's dtype."""
        return sum((self.part_bytes or {}).values())

    def as_json(self) -> dict[str, Any]:
        """Return the fields of the report."""
        if self.problem:
            return {"ranks": self.ranks, "problem": self.problem}
        return {
            "ranks": self.ranks,
            "experts": list(self.experts),
            "bytes": {**(self.part_bytes or {}), "total": self.weight_bytes},
            "stored_bytes": self.stored_bytes,
            "row_bytes": self.row_bytes,
            "kv_bytes_per_token": self.kv_bytes,
            "state_bytes_per_sequence": self.state_bytes,
            "kv_tokens": {f"{gib:g}": tokens for gib, tokens in (self.kv_tokens or {}).items()},
        }


def build_on_meta(hf_config: Any, dtype: torch.dtype, ranks: int = 1, tensor: int = 1) -> CausalLM:
    """Return the model of rank 0, the one with most experts, without memory. Not collective.

    Raises:
        ValueError: it does not run on so many ranks.
    """
    if ranks % tensor:
        raise ValueError(f"parallel.tensor = {tensor}: must divide the number of ranks, {ranks}")
    device = torch.device("meta")
    expert, heads = _group(ranks), _group(tensor)
    topology = Topology(
        world=expert,
        expert=expert,
        tensor=heads,
        control=expert,
        counts=expert,
        host_world=expert,
        host_tensor=heads,
        data_rank=0,
        num_data=ranks // tensor,
        replica=0,
        device=device,
        store=cast(Any, None),
        local_world_size=ranks,
        host="",
    )
    # One position: the rotary table is no part of the weights.
    config = Config(model=ModelConfig(path="unused", max_model_len=1))
    try:
        return build_model(hf_config, config, topology, device, dtype)
    except (RuntimeError, OverflowError) as error:  # more bytes than a number of 64 bits counts
        raise ValueError(f"config.json describes tensors beyond any memory: {error}") from error


def _group(size: int) -> Group:
    return Group(0, size, tuple(range(size)), cast(Any, None))  # nothing communicates


def share_of_rank(
    hf_config: Any,
    dtype: torch.dtype,
    ranks: int,
    tensor: int,
    *,
    names: Collection[str],
    stored: Mapping[str, int],
    whole: Mapping[str, int],
    gpu_gib: Collection[float],
) -> RankShare:
    """Return what the rank with most experts holds.

    Args:
        ranks: of the expert-parallel group.
        tensor: parallel.tensor.
        names: of the checkpoint's tensors.
        stored: part -> bytes in the files.
        whole: part -> bytes of the whole model in `dtype`.
        gpu_gib: sizes of GPUs.
    """
    try:
        model = build_on_meta(hf_config, dtype, ranks, tensor)
    except ValueError as error:
        return RankShare(ranks, problem=str(error))
    parts = part_bytes(model, names)
    as_stored = sum(Fraction(stored.get(part, 0) * parts[part], whole[part]) for part in parts)
    fewest = most = rows = 0
    if model.moe_layers:
        spec = model.moe_layers[0].spec
        sizes = [expert_range(spec.router.num_experts, ranks, rank)[1] for rank in (0, ranks - 1)]
        most, fewest = sizes
        rows = _row_bytes(model, ranks, most, dtype)
    per_token = model.kv_spec.bytes_per_block(1, dtype)
    weights, limits = sum(parts.values()), SchedulerConfig()
    # Every sequence that may run has its states, whatever runs.
    states = model.kv_spec.state_bytes * min(limits.max_sequences, limits.max_batch_tokens)
    tokens = {}
    for gib in gpu_gib:
        free = int((gib * _GIB - weights) * CUDA_SHARE) - rows - states
        tokens[gib] = max(0, free // per_token)
    return RankShare(
        ranks,
        experts=(fewest, most),
        part_bytes=parts,
        stored_bytes=int(as_stored),
        row_bytes=rows,
        kv_bytes=per_token,
        state_bytes=model.kv_spec.state_bytes,
        kv_tokens=tokens,
    )


def part_bytes(model: CausalLM, names: Collection[str]) -> dict[str, int]:
    """Return the bytes of each part of the weights that a rank holds."""
    parts: Counter[str] = Counter()
    for slot in model.weight_slots(names):
        if slot.tied_to is None:
            parts[part_of(slot.name)] += slot.num_bytes
    return dict(parts)


def _row_bytes(model: CausalLM, ranks: int, most: int, dtype: torch.dtype) -> int:
    """Return what a rank keeps on CUDA for the rows of its MoE layers (`generation/memory.py`)."""
    limits, widest = SchedulerConfig(), 0
    for layer in model.moe_layers:
        shape = MoEShape(
            num_ranks=ranks,
            top_k=layer.spec.router.top_k,
            num_experts=layer.spec.router.num_experts,
            num_local_experts=most,
            hidden=layer.spec.width,
            ffn=layer.spec.ffn,
        )
        bound = row_bound(shape, CapacityConfig(), limits.max_batch_tokens, limits.max_sequences)
        widest = max(widest, bound.activation_bytes(shape, dtype, is_cuda=True))
    return widest
