"""Rows of low-bit weights: memory for matrices of them, filled some outputs at a time.

Experts that are held as integers or small floats arrive in parts, by several threads: gate and up
rows are tensors of their own in a file. Parts are of whole rows, so that no two share a group of
columns; they may share a panel, whose rows are then written one by one.

Legend: e experts, O outputs, I input columns, G groups of a row, P panels, N outputs of a panel, 16
or, of scales that they share, 1, C words of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from engine.ops.block_scaled_ffn import BLOCK, BlockWeights
from engine.ops.huge_pages import prefer_huge_pages
from engine.ops.low_bit_floats import (
    FloatWeights,
    pack_fp8,
    pack_mxfp4,
    quantise_fp8,
    round_to_blocks,
    shares_scales,
)
from engine.ops.quantised import PANEL, QuantisedWeights, quantise
from engine.ops.scaled_ffn import FP8, RowWeights, round_rows_reference

LowBit = QuantisedWeights | FloatWeights | RowWeights | BlockWeights


@dataclass(frozen=True, slots=True)
class IntegerLayout:
    """How matrices are held as integers."""

    bits: int  # 8 or 4
    group: int  # columns that share a scale; from the row's length on all of them
    has_zero: bool = False  # whether a group has a zero point of its own


@dataclass(frozen=True, slots=True)
class FloatLayout:
    """How matrices are held as small floats."""

    format: Literal["mxfp4", "fp8"]
    block: tuple[int, int] = (1, 32)  # outputs and columns that share a scale
    in_rows: bool = False  # of FP8: row by row, not in panels; with a scale per output for
    # `scaled_ffn`, per block of 128 x 128 for `block_scaled_ffn`

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return 4 if self.format == "mxfp4" else 8

    @property
    def in_blocks(self) -> bool:
        """Whether it is that of `BlockWeights`."""
        return self.in_rows and self.block == (BLOCK, BLOCK)


Layout = IntegerLayout | FloatLayout


def empty_weights(
    layout: Layout, experts: int, outputs: int, inputs: int, device: torch.device, part: int
) -> LowBit:
    """Return weights [e, O, I] that are to be filled; their padding is zero.

    Args:
        part: outputs that arrive together at most: blocks of scales begin anew with each part.
    """
    if isinstance(layout, FloatLayout) and layout.in_rows:
        codes_eOI = torch.zeros(experts, outputs, inputs, dtype=torch.uint8, device=device)
        if layout.in_blocks:
            shape = experts, -(-outputs // BLOCK), -(-inputs // BLOCK)
            return BlockWeights(codes_eOI.view(FP8), torch.zeros(shape, device=device))
        scale_eO = torch.zeros(experts, outputs, device=device)
        return RowWeights(codes_eOI.view(FP8), scale_eO)
    panels, words = -(-outputs // PANEL), -(-inputs // (32 // layout.bits))
    packed_ePCN = torch.zeros(experts, panels, words, PANEL, dtype=torch.int32, device=device)
    # Decode reads every weight once per step, so memory bandwidth sets its time.
    prefer_huge_pages(packed_ePCN)
    group = min(layout.group if isinstance(layout, IntegerLayout) else layout.block[1], inputs)
    groups = -(-inputs // max(1, group))
    if isinstance(layout, FloatLayout):
        aligned = part % PANEL == 0 or part == outputs
        shared = layout.format == "fp8" and aligned and shares_scales(layout.block[0], part)
        scale_ePGN = torch.zeros(
            *(experts, panels, groups, 1 if shared else PANEL),
            dtype=torch.float32 if layout.format == "fp8" else torch.uint8,
            device=device,
        )
        return FloatWeights(layout.format, group, outputs, inputs, packed_ePCN, scale_ePGN)
    scale_ePGN = torch.zeros(experts, panels, groups, PANEL, device=device)
    zero_ePGN = torch.zeros_like(scale_ePGN) if layout.has_zero else None
    return QuantisedWeights(layout.bits, group, outputs, inputs, packed_ePCN, scale_ePGN, zero_ePGN)


def round_to(weights_eOI: torch.Tensor, layout: Layout) -> LowBit:
    """Return weights rounded to a layout. Raises ValueError: values that are not finite."""
    if isinstance(layout, IntegerLayout):
        assert not layout.has_zero, "zero points are a checkpoint's"
        return quantise(weights_eOI, layout.bits, layout.group)
    assert layout.format == "fp8", "nothing is rounded to MXFP4"
    if layout.in_blocks:
        return BlockWeights(*round_to_blocks(weights_eOI, layout.block))
    if layout.in_rows:
        codes_RI, scale_R = round_rows_reference(weights_eOI.flatten(0, 1))
        if not scale_R.isfinite().all():  # SYNC: while weights are loaded
            raise ValueError(
                "weights_eOI: has values that are not finite; they cannot be quantised"
            )
        shape = weights_eOI.shape
        return RowWeights(codes_RI.view(shape), scale_R.view(shape[:2]))
    return quantise_fp8(weights_eOI, layout.block)


def pack_floats(codes_OB: torch.Tensor, scale_OG: torch.Tensor, layout: FloatLayout) -> LowBit:
    """Return rows of one matrix as weights of one expert.

    Args:
        codes_OB: uint8, of FP8 a weight per byte, of MXFP4 two.
        scale_OG: of every row, float32 or the exponents of MXFP4, as uint8.
    """
    if layout.format == "mxfp4":
        return pack_mxfp4(codes_OB[None], scale_OG[None])
    if layout.in_blocks:
        return BlockWeights(codes_OB[None].view(FP8), scale_OG[None].float(), height=1)
    if layout.in_rows:
        return RowWeights(codes_OB[None].view(FP8), scale_OG[None, :, 0].float())
    return pack_fp8(codes_OB[None], scale_OG[None], (1, layout.block[1]))


def set_rows(
    weights: LowBit, expert: int, first: int, rows: LowBit, at_O: torch.Tensor | None = None
) -> None:
    """Write rows from `first` on of one expert's matrix.

    Args:
        weights: written in place.
        rows: one matrix of the same bits, groups and inputs.
        at_O: int64, where each row goes, counted from `first`; None: one after the other.
    """
    assert (rows.bits, rows.group, rows.inputs) == (weights.bits, weights.group, weights.inputs)
    if isinstance(weights, RowWeights):
        assert isinstance(rows, RowWeights), "both lie row by row"
        place = slice(first, first + rows.outputs) if at_O is None else first + at_O
        weights.codes_eOI.view(torch.uint8)[expert, place] = rows.codes_eOI.view(torch.uint8)[0]
        weights.scale_eO[expert, place] = rows.scale_eO[0]
        return
    if isinstance(weights, BlockWeights):
        assert isinstance(rows, BlockWeights) and at_O is None, "rows of a block lie together"
        _set_rows_of_blocks(weights, expert, first, rows)
        return
    assert not isinstance(rows, RowWeights | BlockWeights), "both lie in panels"
    pairs = [(weights.packed_ePCN, rows.packed_ePCN), (weights.scale_ePGN, rows.scale_ePGN)]
    if weights.zero_ePGN is not None:
        assert rows.zero_ePGN is not None, "a group has a zero point"
        pairs.append((weights.zero_ePGN, rows.zero_ePGN))
    panel, count = first // PANEL, -(-rows.outputs // PANEL)
    whole = (
        at_O is None
        and first % PANEL == 0
        and (rows.outputs % PANEL == 0 or first + rows.outputs == weights.outputs)
    )
    if at_O is None:
        at_O = torch.arange(rows.outputs, device=weights.scale_ePGN.device)
    at_O = first + at_O
    for target, source in pairs:
        width = target.shape[3]
        if whole and width == source.shape[3]:
            target[expert, panel : panel + count].copy_(source[0])
            continue
        rows_OC = source[0].transpose(1, 2).expand(-1, PANEL, -1).flatten(0, 1)[: rows.outputs]
        if width == 1:  # the scales of a panel are those of its first output
            found_PC = rows_OC[-first % PANEL :: PANEL]
            begin = -(-first // PANEL)
            target[expert, begin : begin + len(found_PC), :, 0].copy_(found_PC)
        else:  # the first or last panel has rows of another part
            target[expert].transpose(1, 2).index_put_((at_O // PANEL, at_O % PANEL), rows_OC)


def _set_rows_of_blocks(weights: BlockWeights, expert: int, first: int, rows: BlockWeights) -> None:
    """Write rows from `first` on, and the scales of the blocks that begin among them."""
    part = slice(first, first + rows.outputs)
    weights.codes_eOI.view(torch.uint8)[expert, part] = rows.codes_eOI.view(torch.uint8)[0]
    assert rows.height == 1 or first % rows.height == 0, "blocks are rounded whole"
    found_HG = rows.scale_eHG[0]
    if rows.height == 1:  # a scale for each row, which is that of its block
        found_HG = found_HG[-first % BLOCK :: BLOCK]
    begin = -(-first // BLOCK)
    weights.scale_eHG[expert, begin : begin + len(found_HG)] = found_HG


def tensors_of(weights: LowBit) -> list[torch.Tensor]:
    """Return what matrices consist of: words, scales and zero points, each [e, ...]."""
    if isinstance(weights, RowWeights):
        return [weights.codes_eOI, weights.scale_eO]
    if isinstance(weights, BlockWeights):
        return [weights.codes_eOI, weights.scale_eHG]
    tensors = (weights.packed_ePCN, weights.scale_ePGN, weights.zero_ePGN)
    return [tensor for tensor in tensors if tensor is not None]


def parts_of(weights: LowBit, expert: int) -> list[torch.Tensor]:
    """Return what one expert's matrix consists of, as views; see `tensors_of`."""
    return [tensor[expert] for tensor in tensors_of(weights)]


def bytes_of_rows(weights: LowBit, count: int) -> int:
    """Return the memory of so many rows of a matrix."""
    if isinstance(weights, RowWeights):
        return count * (weights.inputs + weights.scale_eO.itemsize)
    if isinstance(weights, BlockWeights):
        return count * weights.inputs + -(-count // BLOCK) * weights.scale_eHG[0, 0].nbytes
    scales_of = 1 if weights.zero_ePGN is None else 2
    scale_ePGN = weights.scale_ePGN
    scale_bytes = scale_ePGN.shape[2] * scale_ePGN.shape[3] * scale_ePGN.itemsize
    words = 4 * count * weights.packed_ePCN.shape[2]
    return words + scales_of * count * scale_bytes // PANEL
