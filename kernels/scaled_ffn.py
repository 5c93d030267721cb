"""The gated FFN of every local expert in FP8, weights and rows, by torch's scaled grouped product.

Weights are E4M3 with a float32 scale per output, rows are rounded to E4M3 with a scale per row
when they come: its largest magnitude / 448. Five launches are the FFN of all experts: the rows
rounded in the order of the experts, a product, SwiGLU rounded, a product, and the results put
where the rows lie. Sums are in float32, results in bfloat16.

Legend: R rows, I input columns, O outputs, D model dim, F expert hidden dim, e experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from engine.ops import triton_support
from engine.ops.permute import encode_rows_reference
from engine.ops.silu_and_mul import silu_and_mul_reference
from engine.ops.to_device import to_device

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class RowWeights:
    """Matrices [e, O, I] in FP8, row by row, with a scale per output."""

    codes_eOI: torch.Tensor  # float8_e4m3fn
    scale_eO: torch.Tensor  # float32

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
        return self.inputs

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
        return self.codes_eOI.nbytes + self.scale_eO.nbytes

    def dequantised(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix [O, I] of one expert."""
        return (self.codes_eOI[expert].float() * self.scale_eO[expert].unsqueeze(1)).to(dtype)


def round_rows(
    x_RI: torch.Tensor, index_R: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows in float8_e4m3fn [R, I] and their scales, float32 [R].

    index_R: int64, which rows of x; None: all of them.
    """
    if triton_support.serves(x_RI):
        from engine.ops.gpu.round_rows import round_rows_triton

        return round_rows_triton(x_RI, index_R)
    return round_rows_reference(x_RI, index_R)


def round_rows_reference(
    x_RI: torch.Tensor, index_R: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch form of `round_rows`."""
    codes_RI, scale_R1 = encode_rows_reference(x_RI if index_R is None else x_RI[index_R], FP8)
    assert scale_R1 is not None
    return codes_RI.view(FP8), scale_R1[:, 0]


def silu_and_round(gate_up_R2F: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `round_rows` of `silu_and_mul`, in one launch on CUDA: [R, F] and [R]."""
    if triton_support.serves(gate_up_R2F):
        from engine.ops.gpu.round_rows import silu_and_round_triton

        return silu_and_round_triton(gate_up_R2F)
    return silu_and_round_reference(gate_up_R2F)


def silu_and_round_reference(gate_up_R2F: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch form of `silu_and_round`."""
    return round_rows_reference(silu_and_mul_reference(gate_up_R2F))


def scaled_product(
    codes_RI: torch.Tensor,
    scale_R: torch.Tensor,
    weights: RowWeights,
    ends_e: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return x W^T of each row's expert, [R, O] in `dtype`.

    Args:
        codes_RI, scale_R: of `round_rows`, grouped by expert.
        weights: of all experts.
        ends_e: int32, the end of each expert's rows, on their device.
        dtype: bfloat16 on CUDA.
    """
    if not codes_RI.is_cuda:
        return scaled_product_reference(codes_RI, scale_R, weights, ends_e, dtype)
    return torch._scaled_grouped_mm(
        codes_RI,
        weights.codes_eOI.transpose(1, 2),
        scale_R,
        weights.scale_eO,
        offs=ends_e,
        out_dtype=dtype,
        # Sums stay in float32: the fast form keeps some 14 bits between steps.
        use_fast_accum=False,
    )


def scaled_product_reference(
    codes_RI: torch.Tensor,
    scale_R: torch.Tensor,
    weights: RowWeights,
    ends_e: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Plain torch form of `scaled_product`, in float32 on widened weights, expert by expert."""
    out_RO = codes_RI.new_empty(len(codes_RI), weights.outputs, dtype=dtype)
    start = 0
    for expert, end in enumerate(ends_e.tolist()):  # SYNC: the plain form, on the CPU
        if start < end:
            rows = slice(start, end)
            made_RO = F.linear(codes_RI[rows].float(), weights.codes_eOI[expert].float())
            out_RO[rows] = made_RO * scale_R[rows].unsqueeze(1) * weights.scale_eO[expert]
        start = end
    return out_RO


def scaled_ffn(
    x_RD: torch.Tensor,
    w13_e2FD: RowWeights,
    w2_eDF: RowWeights,
    counts_e: list[int],
    out_RD: torch.Tensor | None = None,
    index_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """`grouped_ffn` in FP8: the same arguments, the same order of rows."""
    num_rows = sum(counts_e)
    if num_rows == 0:
        return torch.empty_like(x_RD) if out_RD is None else out_RD
    counts = torch.tensor(counts_e, dtype=torch.int32)
    ends_e = to_device(counts.cumsum(0, dtype=torch.int32), x_RD.device)
    rounded = round_rows(x_RD, index_R)
    hidden_R2F = scaled_product(*rounded, w13_e2FD, ends_e, x_RD.dtype)
    rounded = silu_and_round(hidden_R2F)
    made_RD = scaled_product(*rounded, w2_eDF, ends_e, x_RD.dtype)
    if index_R is None:
        return made_RD
    out_RD = torch.empty_like(x_RD) if out_RD is None else out_RD
    return out_RD.index_copy_(0, index_R, made_RD)
