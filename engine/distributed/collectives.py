"""Small collectives under names that hold across torch versions; everything else calls
torch.distributed itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed.groups import Group

# torch 2.13 renamed all_gather_into_tensor to all_gather_single and warns about the old name.
_all_gather: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)


def all_gather_rows(part: torch.Tensor, group: Group) -> torch.Tensor:
    """Stack every rank's rows: part [n, ...] gives [W * n, ...] in rank order, the same n
    everywhere.

    Collective over `group`: every rank must call. A group of one returns `part` itself.
    """
    if group.size == 1:
        return part
    out = part.new_empty((group.size * part.shape[0], *part.shape[1:]))
    _all_gather(out, part.contiguous(), group=group.handle)
    return out


def broadcast_object(value: Any, group: Group) -> Any:
    """Return rank 0's value on every rank (pickled, small host data). Collective over `group`."""
    if group.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=group.ranks[0], group=group.handle)
    return box[0]


def gather_objects(value: Any, group: Group) -> list[Any]:
    """Return every rank's value on every rank, in rank order (pickled; for small host data).
    Collective over `group`.
    """
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    dist.all_gather_object(values, value, group=group.handle)
    return values
