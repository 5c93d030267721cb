"""The gated FFN of every local expert in FP8 in blocks of 128 x 128, by DeepGEMM's grouped product.

Rows are rounded to E4M3 as they come, with a float32 scale per 128 columns: their largest magnitude
/ 448. They are put where the product wants them, in one of two layouts of P rows. P follows from
the number of rows alone, so that the device, which has the counts per expert, places them:

    contiguous   an expert's rows begin at a multiple of the library's alignment, 128
    masked       every expert has room for 128 rows: for steps with few rows, whose tiles may be
                 smaller there

Rows between an expert's last and the next one's first are uninitialised and never read back.

Legend: R rows, P rows of a layout, I input columns, O outputs, D model dim, F expert hidden dim,
e experts, G groups of 128 columns, H blocks of 128 outputs, S slabs of M rows whose scales lie
together: of the masked layout one per expert, else one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from engine.ops import triton_support
from engine.ops.deep_gemm_library import load_deep_gemm
from engine.ops.permute import gather_rows
from engine.ops.silu_and_mul import silu_and_mul_reference
from engine.ops.to_device import to_device

FP8 = torch.float8_e4m3fn
BLOCK = 128  # outputs and columns that share a scale
_LARGEST = 448.0  # of E4M3
# Rows of an expert in the masked layout: a multiple of the rows of every tile that may run.
MASKED_ROWS = 128


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """Matrices [e, O, I] in FP8, row by row, with a scale per block."""

    codes_eOI: torch.Tensor  # float8_e4m3fn
    scale_eHG: torch.Tensor  # float32
    height: int = BLOCK  # outputs that share a scale; 1 of rows that were read

    @property
    def format(self) -> Literal["fp8"]:
        """What the bits of a weight are."""
        return "fp8"

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return 8

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return BLOCK

    @property
    def num_experts(self) -> int:
        """How many matrices there are."""
        return self.codes_eOI.shape[0]

    @property
    def outputs(self) -> int:
        """O."""
        return self.codes_eOI.shape[1]

    @property
    def inputs(self) -> int:
        """I."""
        return self.codes_eOI.shape[2]

    @property
    def num_bytes(self) -> int:
        """Memory of codes and scales."""
        return self.codes_eOI.nbytes + self.scale_eHG.nbytes

    def dequantised(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix [O, I] of one expert."""
        scale_OI = self.scale_eHG[expert].repeat_interleave(self.height, 0)[: self.outputs]
        scale_OI = scale_OI.repeat_interleave(BLOCK, 1)[:, : self.inputs]
        return (self.codes_eOI[expert].float() * scale_OI).to(dtype)


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where rows that are grouped by expert lie for the product."""

    rows: int  # P
    slab: int  # M
    alignment: int  # of an expert's first row; 0: the masked layout

    @classmethod
    def of(cls, num_rows: int, num_experts: int, alignment: int) -> RowLayout:
        """Return the layout of so many rows, however many each expert has.

        Masked where it takes no more memory than contiguous rows and no expert has more than fit.
        """
        if num_experts <= num_rows <= MASKED_ROWS:
            return cls(num_experts * MASKED_ROWS, MASKED_ROWS, 0)
        most = num_rows + min(num_rows, num_experts) * (alignment - 1)
        most = -(-most // alignment) * alignment
        return cls(most, most, alignment)


class PlacedRows(NamedTuple):
    """Rounded rows in a layout."""

    codes_PI: torch.Tensor  # float8_e4m3fn
    scale_SGM: torch.Tensor  # float32
    owner_P: torch.Tensor  # int32, the expert of each row, -1: none
    place_R: torch.Tensor  # int64, where each row of the grouped order lies


def place_and_round(
    x_RI: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_e: torch.Tensor,
    ends_e: torch.Tensor,
    layout: RowLayout,
) -> PlacedRows:
    """Round rows per 128 columns, and put them where the product takes them.

    Args:
        x_RI: rows, any float dtype; I is a multiple of 128.
        index_R: int64, which rows of x, grouped by expert; None: x is grouped.
        counts_e: int32, rows of each expert, on their device.
        ends_e: int32, the end of each expert's rows.
        layout: of `RowLayout.of` the number of rows.
    """
    if triton_support.serves(x_RI):
        from engine.ops.gpu.round_blocks import place_and_round_triton

        return place_and_round_triton(x_RI, index_R, counts_e, ends_e, layout)
    return place_and_round_reference(x_RI, index_R, counts_e, ends_e, layout)


def place_and_round_reference(
    x_RI: torch.Tensor,
    index_R: torch.Tensor | None,
    counts_e: torch.Tensor,
    ends_e: torch.Tensor,
    layout: RowLayout,
) -> PlacedRows:
    """Plain torch form of `place_and_round`; rows of no expert are NaN."""
    x_RI = x_RI if index_R is None else x_RI[index_R]
    experts = torch.arange(len(counts_e), device=x_RI.device)
    if layout.alignment:
        padded_e = -(-counts_e.long() // layout.alignment) * layout.alignment
        begin_e = padded_e.cumsum(0) - padded_e
    else:
        begin_e = experts * layout.slab
    row_R = torch.arange(len(x_RI), device=x_RI.device)
    expert_R = torch.searchsorted(ends_e.long(), row_R, right=True)
    place_R = begin_e[expert_R] + row_R - (ends_e - counts_e)[expert_R]
    owner_P = torch.full((layout.rows,), -1, dtype=torch.int32, device=x_RI.device)
    owner_P[place_R] = expert_R.int()
    return PlacedRows(*_round_into(x_RI, place_R, layout), owner_P, place_R)


def silu_and_place(
    gate_up_P2F: torch.Tensor, owner_P: torch.Tensor, slab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `silu_and_mul` of the rows of an expert, rounded where they lie: codes [P, F] and
    scales [S, G, M].

    slab: M.
    """
    if triton_support.serves(gate_up_P2F):
        from engine.ops.gpu.round_blocks import silu_and_place_triton

        return silu_and_place_triton(gate_up_P2F, owner_P, slab)
    return silu_and_place_reference(gate_up_P2F, owner_P, slab)


def silu_and_place_reference(
    gate_up_P2F: torch.Tensor, owner_P: torch.Tensor, slab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch form of `silu_and_place`; rows of no expert are NaN."""
    place_R = (owner_P >= 0).nonzero().flatten()  # SYNC: the plain form, on the CPU
    made_RF = silu_and_mul_reference(gate_up_P2F[place_R])
    return _round_into(made_RF, place_R, RowLayout(len(owner_P), slab, 0))


def _round_into(
    x_RI: torch.Tensor, place_R: torch.Tensor, layout: RowLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [P, I] and scales [S, G, M] of rows at their places; all else is NaN."""
    rows, slab, groups = layout.rows, layout.slab, x_RI.shape[1] // BLOCK
    parts = x_RI.float().unflatten(1, (groups, BLOCK))
    scale_RG = parts.abs().amax(2) / _LARGEST
    scale_RG = scale_RG.clamp(min=torch.finfo(torch.float32).tiny)  # NaN stays NaN
    codes_RI = (parts / scale_RG.unsqueeze(2)).flatten(1).to(FP8).view(torch.uint8)
    codes_PI = torch.full((rows, x_RI.shape[1]), 0x7F, dtype=torch.uint8, device=x_RI.device)
    codes_PI[place_R] = codes_RI
    scale_SGM = torch.full((rows // slab, groups, slab), torch.nan, device=x_RI.device)
    scale_SGM[place_R // slab, :, place_R % slab] = scale_RG
    return codes_PI.view(FP8), scale_SGM


def block_product(
    rows: tuple[torch.Tensor, torch.Tensor],
    weights: BlockWeights,
    counts_e: torch.Tensor,
    owner_P: torch.Tensor,
    expected: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return x W^T of each row's expert, [P, O] in `dtype`; rows of no expert are uninitialised.

    Args:
        rows: codes [P, I] and scales [S, G, M].
        weights: of all experts.
        counts_e: int32, rows of each expert, on their device.
        owner_P: int32, the expert of each row, -1: none.
        expected: rows per expert, about; a hint for the masked layout.
        dtype: bfloat16 on CUDA.
    """
    if not owner_P.is_cuda:
        return block_product_reference(rows, weights, owner_P, dtype)
    return library_product(rows, weights, counts_e, owner_P, expected, dtype)


def library_product(
    rows: tuple[torch.Tensor, torch.Tensor],
    weights: BlockWeights,
    counts_e: torch.Tensor,
    owner_P: torch.Tensor,
    expected: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`block_product` by DeepGEMM: the same arguments."""
    (codes_PI, scale_SGM), library = rows, load_deep_gemm()
    held = weights.codes_eOI, weights.scale_eHG
    out_PO = codes_PI.new_empty(len(codes_PI), weights.outputs, dtype=dtype)
    if len(scale_SGM) == 1:
        library.contiguous((codes_PI, scale_SGM[0].T), held, out_PO, owner_P)
    else:
        shape = len(scale_SGM), scale_SGM.shape[2], -1
        placed = codes_PI.view(shape), scale_SGM.transpose(1, 2)
        library.masked(placed, held, out_PO.view(shape), counts_e, expected)
    return out_PO


def block_product_reference(
    rows: tuple[torch.Tensor, torch.Tensor],
    weights: BlockWeights,
    owner_P: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Plain torch form of `block_product`, in float32 on widened rows and weights."""
    codes_PI, scale_SGM = rows
    scale_PG = scale_SGM.transpose(1, 2).flatten(0, 1)
    out_PO = torch.full((len(codes_PI), weights.outputs), torch.nan, dtype=dtype)
    for expert in owner_P.unique().tolist():  # SYNC: the plain form, on the CPU
        if expert >= 0:
            mine = owner_P == expert
            wide_RI = codes_PI[mine].float() * scale_PG[mine].repeat_interleave(BLOCK, 1)
            out_PO[mine] = F.linear(wide_RI, weights.dequantised(expert, torch.float32)).to(dtype)
    return out_PO


def block_scaled_ffn(
    x_RD: torch.Tensor,
    w13_e2FD: BlockWeights,
    w2_eDF: BlockWeights,
    counts_e: list[int],
    out_RD: torch.Tensor | None = None,
    index_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """`grouped_ffn` in FP8: the same arguments, the same order of rows."""
    num_rows = sum(counts_e)
    if num_rows == 0:
        return torch.empty_like(x_RD) if out_RD is None else out_RD
    alignment = load_deep_gemm().alignment() if x_RD.is_cuda else BLOCK
    layout = RowLayout.of(num_rows, len(counts_e), alignment)
    counts = torch.tensor(counts_e, dtype=torch.int32)
    sent = to_device(torch.stack((counts, counts.cumsum(0, dtype=torch.int32))), x_RD.device)
    placed = place_and_round(x_RD, index_R, sent[0], sent[1], layout)
    expected = -(-num_rows // len(counts_e))
    more = sent[0], placed.owner_P, expected, x_RD.dtype
    hidden_P2F = block_product(placed[:2], w13_e2FD, *more)
    rounded = silu_and_place(hidden_P2F, placed.owner_P, layout.slab)
    made_PD = block_product(rounded, w2_eDF, *more)
    if index_R is None:
        return gather_rows(made_PD, placed.place_R)
    out_RD = torch.empty_like(x_RD) if out_RD is None else out_RD
    return out_RD.index_copy_(0, index_R, made_PD.index_select(0, placed.place_R))
