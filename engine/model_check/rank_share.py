"""Rank share: what a rank of so many holds, in bytes, worked out from the model without its memory.

The model is built on torch's meta device, as a rank would build it, for groups that do not exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import torch

from engine.config import CapacityConfig, Config, ModelConfig, SchedulerConfig
from engine.distributed.groups import Group, Topology, expert_range
from engine.generation.memory import CUDA_SHARE, MoEShape, row_bound
from engine.layers.precision import cache_dtype
from engine.model_check.stored_tensors import part_finder
from engine.models.language_model import LanguageModel
from engine.models.model_types import Implementation
from engine.models.registry import build_model
from engine.moe.low_bit_experts import ExpertLayouts

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class RankShare:
    """The rank that holds most of a model on so many ranks; or why it does not run on them."""

    ranks: int
    problem: str = ""
    experts: tuple[int, int] = (0, 0)  # per layer, of the rank that has fewest and of it
    part_bytes: Mapping[str, int] | None = None  # as the rank holds them
    stored_bytes: int = 0  # of the same weights as the files have them
    row_bytes: int = 0  # of what is kept for rows of MoE layers, at the default settings
    kv_bytes: int = 0  # per token
    kv_float8_bytes: int = 0  # per token, with scheduler.kv_dtype = fp8
    state_bytes: int = 0  # of recurrent states, per sequence
    kv_tokens: Mapping[float, int] | None = None  # GiB of a GPU -> tokens; 0: no room

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, as the rank holds them."""
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
            "kv_fp8_bytes_per_token": self.kv_float8_bytes,
            "state_bytes_per_sequence": self.state_bytes,
            "kv_tokens": {f"{gib:g}": tokens for gib, tokens in (self.kv_tokens or {}).items()},
        }


@dataclass(frozen=True, slots=True)
class Setup:
    """A model and how ranks hold it."""

    hf_config: Any
    dtype: torch.dtype
    tensor: int = 1  # parallel.tensor
    layouts: Mapping[int, ExpertLayouts] | None = None  # by layer, of experts that are integers
    names: Collection[str] = ()  # of the checkpoint's tensors
    implementation: Implementation = "auto"  # model.implementation

    def build(self, ranks: int | None = None) -> LanguageModel:
        """Return the model of rank 0, the one with most experts, without memory. Not collective.

        ranks: of the expert-parallel group; None: one rank has the whole model.

        Raises:
            ValueError: it does not run on so many ranks.
        """
        tensor = 1 if ranks is None else self.tensor
        ranks = ranks or 1
        if ranks % tensor:
            raise ValueError(
                f"parallel.tensor = {tensor}: must divide the number of ranks, {ranks}"
            )
        topology = topology_on_meta(ranks, tensor)
        device, layouts = topology.device, self.layouts
        # One position: the rotary table is no part of the weights.
        config = Config(
            model=ModelConfig(path="unused", max_model_len=1, implementation=self.implementation)
        )
        try:
            return build_model(
                self.hf_config, config, topology, device, self.dtype, layouts=layouts
            )
        except (RuntimeError, OverflowError) as error:  # more bytes than 64 bits count
            raise ValueError(f"config.json describes tensors beyond any memory: {error}") from error


def topology_on_meta(ranks: int, tensor: int = 1) -> Topology:
    """Return the place of rank 0 among ranks that do not exist."""
    expert, heads = _group(ranks), _group(tensor)
    return Topology(
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
        device=torch.device("meta"),
        store=cast(Any, None),
        local_world_size=ranks,
        host="",
    )


def _group(size: int) -> Group:
    return Group(0, size, tuple(range(size)), cast(Any, None))  # nothing communicates


def shares_of_ranks(
    setup: Setup,
    plain: LanguageModel,
    ranks: Sequence[int],
    stored: Mapping[str, int],
    gpu_gib: Collection[float],
) -> list[RankShare]:
    """Return what the rank with most experts holds, for each number of ranks.

    Args:
        plain: the whole model, its experts in the model's dtype.
        ranks: numbers of expert-parallel ranks.
        stored: part -> bytes in the files.
        gpu_gib: sizes of GPUs.
    """
    alone = setup.build() if setup.layouts else plain
    whole = part_bytes(alone, setup.names)
    return [_share_of_rank(setup, alone, number, stored, whole, gpu_gib) for number in ranks]


def _share_of_rank(
    setup: Setup,
    alone: LanguageModel,
    ranks: int,
    stored: Mapping[str, int],
    whole: Mapping[str, int],
    gpu_gib: Collection[float],
) -> RankShare:
    try:
        model = alone if ranks == setup.tensor == 1 else setup.build(ranks)
    except ValueError as error:
        return RankShare(ranks, problem=str(error))
    dtype = setup.dtype
    parts = whole if model is alone else part_bytes(model, setup.names)
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
        kv_float8_bytes=model.kv_spec.bytes_per_block(1, cache_dtype("fp8", dtype)),
        state_bytes=model.kv_spec.state_bytes,
        kv_tokens=tokens,
    )


def part_bytes(model: LanguageModel, names: Collection[str]) -> dict[str, int]:
    """Return the bytes of each part of the weights that a rank holds."""
    parts: Counter[str] = Counter()
    find_part = part_finder(model, names)
    for slot in model.weight_slots(names):
        if slot.tied_to is None:
            parts[find_part(slot.name)] += slot.num_bytes
    return dict(parts)


def _row_bytes(model: LanguageModel, ranks: int, most: int, dtype: torch.dtype) -> int:
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
