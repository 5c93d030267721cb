"""What the fakes of communication libraries share: rules, and an exchange over any group."""

from __future__ import annotations

from typing import Any

import torch


class ContractError(ValueError):
    """A call that the library refuses, or computes wrongly without a sign of it."""


def demand(holds: bool, rule: str) -> None:
    """Raise unless a rule of the library holds."""
    if not holds:
        raise ContractError(rule)


def gather(group: Any, part: torch.Tensor) -> list[torch.Tensor]:
    """Return the parts of all ranks, which may differ in their first dim."""
    own = torch.tensor([part.shape[0]])
    counts = [torch.zeros_like(own) for _ in range(group.size())]
    group.allgather([counts], [own]).wait()
    rows = [int(count) for count in counts]
    padded = part.new_zeros(max(rows), *part.shape[1:])
    padded[: part.shape[0]] = part
    parts = [torch.zeros_like(padded) for _ in rows]
    if padded.numel():
        as_bytes = [each.view(torch.uint8) for each in parts]
        group.allgather([as_bytes], [padded.view(torch.uint8)]).wait()
    return [each[:count] for each, count in zip(parts, rows, strict=True)]
