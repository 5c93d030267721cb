"""Rows of quantised weights: memory for matrices of integers, filled some outputs at a time.

Experts that are held as integers arrive in parts, by several threads: gate and up rows are tensors
of their own in a file. Parts are of whole rows, so that no two share a group of columns; they may
share a panel, whose rows are then written one by one.

Legend: e experts, O outputs, I input columns, G groups of a row, P panels, N = 16 outputs of a
panel, C words of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.ops.huge_pages import prefer_huge_pages
from engine.ops.quantised import PANEL, QuantisedWeights


@dataclass(frozen=True, slots=True)
class IntegerLayout:
    """How matrices are held as integers."""

    bits: int  # 8 or 4
    group: int  # columns that share a scale; from the row's length on all of them
    has_zero: bool = False  # whether a group has a zero point of its own


def empty_quantised(
    layout: IntegerLayout, experts: int, outputs: int, inputs: int, device: torch.device
) -> QuantisedWeights:
    """Return weights [e, O, I] that are to be filled; their padding is zero."""
    group = min(layout.group, inputs)
    panels, words = -(-outputs // PANEL), -(-inputs // (32 // layout.bits))
    packed_ePCN = torch.zeros(experts, panels, words, PANEL, dtype=torch.int32, device=device)
    # Decode reads every weight once per step, so memory bandwidth sets its time.
    prefer_huge_pages(packed_ePCN)
    of_groups = experts, panels, -(-inputs // group), PANEL
    scale_ePGN = torch.zeros(of_groups, device=device)
    zero_ePGN = torch.zeros(of_groups, device=device) if layout.has_zero else None
    return QuantisedWeights(layout.bits, group, outputs, inputs, packed_ePCN, scale_ePGN, zero_ePGN)


def set_rows(weights: QuantisedWeights, expert: int, first: int, rows: QuantisedWeights) -> None:
    """Write rows from `first` on of one expert's matrix.

    Args:
        weights: written in place.
        rows: one matrix of the same bits, groups and inputs.
    """
    assert (rows.bits, rows.group, rows.inputs) == (weights.bits, weights.group, weights.inputs)
    pairs = [(weights.packed_ePCN, rows.packed_ePCN), (weights.scale_ePGN, rows.scale_ePGN)]
    if weights.zero_ePGN is not None:
        assert rows.zero_ePGN is not None, "a group has a zero point"
        pairs.append((weights.zero_ePGN, rows.zero_ePGN))
    panel, count = first // PANEL, -(-rows.outputs // PANEL)
    whole = first % PANEL == 0 and (
        rows.outputs % PANEL == 0 or first + rows.outputs == weights.outputs
    )
    at_O = torch.arange(first, first + rows.outputs, device=weights.scale_ePGN.device)
    for target, source in pairs:
        if whole:
            target[expert, panel : panel + count].copy_(source[0])
        else:  # the first or last panel has rows of another part
            rows_OC = source[0].transpose(1, 2).flatten(0, 1)[: rows.outputs]
            target[expert].transpose(1, 2).index_put_((at_O // PANEL, at_O % PANEL), rows_OC)


def parts_of(weights: QuantisedWeights, expert: int) -> list[torch.Tensor]:
    """Return what one expert's matrix consists of: words, scales and zero points, as views."""
    tensors = (weights.packed_ePCN, weights.scale_ePGN, weights.zero_ePGN)
    return [tensor[expert] for tensor in tensors if tensor is not None]
