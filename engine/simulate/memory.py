"""Memory: bytes of the rank that holds most, by the engine's formulas.

Weights of experts and copies, the other weights where the model is known, and the row buffers of
`generation/memory.py` on a GPU. Keys and values take what is left; they are not counted.
"""

from __future__ import annotations

import torch

from engine.generation.memory import MoEShape, row_bound
from engine.moe.placement.budget import copy_bytes
from engine.moe.placement.instances import Instances
from engine.simulate.scenario import Scenario
from engine.simulate.shape import Shape

_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_DECODE = 256  # tokens that may be exempt from capacity, scheduler.max_sequences


def rank_bytes(
    scenario: Scenario, shape: Shape, layers: list[Instances], tokens_per_rank: int
) -> int:
    """Return the bytes of the rank that holds most, without keys and values.

    Args:
        scenario: whose policy bounds the rows.
        shape: of the model.
        layers: the instances of each MoE layer.
        tokens_per_rank: of a step, the most.
    """
    size = scenario.expert_ranks
    expert = copy_bytes(shape.expert_weights, shape.weight_bytes, "model")
    copy = copy_bytes(shape.expert_weights, shape.weight_bytes, scenario.precision)
    weights = max(
        sum(
            each.num_homes(rank) * expert + (each.num_local(rank) - each.num_homes(rank)) * copy
            for each in layers
        )
        for rank in range(size)
    )
    rows = 0
    for instances in layers:
        moe = MoEShape(
            num_ranks=size,
            top_k=shape.top_k,
            num_experts=shape.num_experts,
            num_local_experts=instances.most_local,
            hidden=shape.hidden,
            ffn=shape.ffn,
            num_homes=instances.most_homes,
            has_copies=instances.has_copies,
        )
        bound = row_bound(moe, scenario.capacity, tokens_per_rank, _DECODE)
        dtype = _DTYPES[shape.activation_bytes]
        rows = max(rows, bound.activation_bytes(moe, dtype, is_cuda=True))
    return weights + rows + (shape.other_bytes or 0)
