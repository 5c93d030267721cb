"""Copy weights: an expert's weights as the bytes that its copies hold, to move them between ranks.

Copies that are as precise as homes hold what these hold, in the layout that the backend uses: the
bytes of the home are those of the copy. Copies of fewer bits hold quantised weights, which the
home's rank makes from what it holds.

Legend: D model dim, F expert hidden dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.moe.local_experts import LocalExperts
from engine.ops.panels import from_panels
from engine.ops.quantised_rows import parts_of, round_to


def read_home(experts: LocalExperts, local: int) -> list[torch.Tensor]:
    """Return what a copy of a home holds, as flat bytes; views of the home's weights, or quantised.

    Args:
        experts: of this rank and layer.
        local: the home's place among its instances.
    """
    layouts, held = experts.copy_layouts, experts.low_bit_of(local)
    if layouts is None:
        return _parts(experts, local)
    if held is not None:
        values = held[0].values(held[1])
    else:
        stacked = experts.stacked
        values = from_panels(stacked.w13_e2FD, local, 2), from_panels(stacked.w2_eDF, local)
    made = [
        round_to(weights[None], layout)
        for weights, layout in zip(values, (layouts.w13, layouts.w2), strict=True)
    ]
    return [_bytes(part) for each in made for part in parts_of(each, 0)]


def copy_parts(experts: LocalExperts, place: int) -> list[torch.Tensor]:
    """Return the weights of a copy as flat bytes, views to write to, in the order of `read_home`.

    Args:
        experts: of this rank and layer.
        place: of the copy among this rank's copies.
    """
    return _parts(experts, experts.num_homes + place)


def _parts(experts: LocalExperts, local: int) -> list[torch.Tensor]:
    held = experts.low_bit_of(local)
    if held is not None:
        return [_bytes(part) for part in held[0].parts(held[1])]
    return [_bytes(weight[local]) for weight in experts.stacked.tensors]


def num_bytes(parts: Sequence[torch.Tensor]) -> int:
    """Return the bytes of all parts."""
    return sum(part.numel() for part in parts)


def read_bytes(parts: Sequence[torch.Tensor], start: int, row: torch.Tensor) -> None:
    """Copy the bytes of all parts, one after the other, from `start` on into a row."""
    for part, own, there in _overlaps(parts, start, row.numel()):
        row[there].copy_(part[own])


def write_bytes(parts: Sequence[torch.Tensor], start: int, row: torch.Tensor) -> None:
    """Copy a row into the bytes of all parts from `start` on."""
    for part, own, there in _overlaps(parts, start, row.numel()):
        part[own].copy_(row[there])


def _overlaps(
    parts: Sequence[torch.Tensor], start: int, length: int
) -> list[tuple[torch.Tensor, slice, slice]]:
    """Return each part that [start, start + length) meets: its range, and that of the row."""
    found, first = [], 0
    for part in parts:
        low, high = max(start, first), min(start + length, first + part.numel())
        if low < high:
            found.append((part, slice(low - first, high - first), slice(low - start, high - start)))
        first += part.numel()
    return found


def _bytes(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().reshape(-1).view(torch.uint8)
