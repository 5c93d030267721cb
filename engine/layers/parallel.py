"""Tensor parallelism of attention: which heads a rank owns, and the two reductions that follow.

Used by `attention.py` and `mla.py`. Only attention is split: query heads are cut into equal
consecutive shares, the output projection is cut along the same heads, and its partial products are
summed over `topology.tensor`. Embeddings, norms, dense MLPs and the language-model head are
replicated.

Worked example, 8 query heads, 2 key/value heads:
    tensor 2    rank 0: heads 0-3, kv head 0      rank 1: heads 4-7, kv head 1
    tensor 4    rank 0: heads 0-1, kv head 0      rank 1: heads 2-3, kv head 0 (a replica)   ...

Legend: T tokens, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from engine.distributed.groups import Group


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads one tensor rank owns, consecutive from the first one.

    `kv_replicas` ranks of the tensor group hold the same key/value heads.
    """

    num_heads: int
    first_head: int
    num_kv_heads: int
    first_kv_head: int
    kv_replicas: int


def share_heads(num_heads: int, num_kv_heads: int, group: Group) -> HeadShare:
    """Return this rank's consecutive share of the heads.

    Key/value heads are replicated when there are fewer of them than ranks.

    Raises:
        ValueError: when the ranks do not divide the heads evenly.
    """
    size = group.size
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_key_value_heads = {num_kv_heads} must divide num_attention_heads = {num_heads}; "
            f"check the checkpoint's config.json"
        )
    if num_heads % size:
        raise ValueError(
            f"parallel.tensor = {size} must divide the model's {num_heads} attention heads; "
            f"set parallel.tensor to a divisor of {num_heads}"
        )
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(
            f"parallel.tensor = {size} must divide the model's {num_kv_heads} key/value heads or "
            f"be a multiple of them; set parallel.tensor to a divisor of {num_kv_heads}"
        )
    replicas = max(1, size // num_kv_heads)
    local_kv = max(1, num_kv_heads // size)
    return HeadShare(
        num_heads=num_heads // size,
        first_head=group.rank * (num_heads // size),
        num_kv_heads=local_kv,
        first_kv_head=group.rank // replicas * local_kv,
        kv_replicas=replicas,
    )


def sum_over(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum `x` over the group in place and return it. Collective over TP: every rank must call."""
    if group.size > 1:
        dist.all_reduce(x, group=group.handle)
    return x


def empty_parameter(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Return an uninitialised parameter without gradient: a weight slot fills it."""
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
