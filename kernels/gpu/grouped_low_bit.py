"""grouped_low_bit on CUDA: one Triton program per (tile of an expert's rows, run of outputs).

A program walks the words of its outputs, dequantises some columns of them into x's dtype in
registers, and multiplies them with tl.dot, summed in float32. No weight is written back to memory.
Integers, MXFP4 and FP8 lie in the same panels of words (`kernels/quantised.py`) and differ in how
bits become a number.

`grouped_low_bit` imports this file only where Triton and a CUDA tensor are at hand.

Legend: R rows, I inputs, O outputs, T tiles; in the kernel M rows, N outputs, C words and K columns
of a program, J columns of a word.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import DTYPES, Variant, meta
from engine.ops.low_bit_weights import PackedWeights


@triton.jit
def _floats(q, FORMAT: tl.constexpr):
    # Sign, exponent and mantissa, moved, are those of a float16 that is a power of two smaller,
    # also where it is subnormal. Compiles for GPUs that have no conversion from FP8.
    if FORMAT == "mxfp4":
        half = ((q & 7) << 9) | ((q & 8) << 12)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
    half = ((q & 127) << 7) | ((q & 128) << 8)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


# `index` and `tiles` are views that begin anywhere; what changes from step to step is the grid.
@triton.jit(do_not_specialize_on_alignment=["index", "tiles"])
def _grouped_low_bit_kernel(
    x,
    packed,
    scale,
    zero,
    bias,
    out,
    index,
    tiles,
    outputs,
    inputs,
    words,
    groups,
    group,
    x_stride,
    out_stride,
    FORMAT: tl.constexpr,
    BITS: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    COLUMNS: tl.constexpr = 32 // BITS
    BLOCK_K: tl.constexpr = BLOCK_C * COLUMNS
    tile = tiles + 3 * tl.program_id(0)
    expert = tl.load(tile).to(tl.int64)
    row_M = tl.load(tile + 1) + tl.arange(0, BLOCK_M)
    exists_M = row_M < tl.load(tile + 2)
    row_M = row_M.to(tl.int64)
    source_M = row_M
    target_M = row_M
    if GATHER or SCATTER:
        listed_M = tl.load(index + row_M, mask=exists_M, other=0).to(tl.int64)
        if GATHER:
            source_M = listed_M
        if SCATTER:
            target_M = listed_M
    output_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    panel_N = output_N // 16
    panels = tl.cdiv(outputs, 16)
    panel_1N = (panel_N < panels)[None, :]
    packed_1N = packed + expert * panels * words * 16 + (panel_N * words * 16 + output_N % 16)
    packed_1N = packed_1N[None, :]
    # 16 scales of a panel, or one that all of its outputs share.
    scale_N = panel_N * groups * SCALES + output_N % SCALES
    scale_1N = (expert * panels * groups * SCALES + scale_N)[None, :]

    x_M1 = x + (source_M * x_stride)[:, None]
    exists_M1 = exists_M[:, None]
    shift_1J1 = (tl.arange(0, COLUMNS) * BITS)[None, :, None]
    acc_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for word in range(0, words, BLOCK_C):
        word_C1 = (word + tl.arange(0, BLOCK_C))[:, None]
        loaded_CN = (word_C1 < words) & panel_1N
        packed_CN = tl.load(packed_1N + word_C1 * 16, mask=loaded_CN, other=0)
        q_CJN = (packed_CN[:, None, :] >> shift_1J1) & ((1 << BITS) - 1)
        if ONE_GROUP:  # all columns of this turn
            at = scale_1N + word * COLUMNS // group * SCALES
            has_scale = panel_1N
        else:
            at = scale_1N + word_C1 * COLUMNS // group * SCALES
            has_scale = loaded_CN
        scale_CN = tl.load(scale + at, mask=has_scale, other=0)
        if FORMAT == "mxfp4":  # the exponent of a float32; 2 ** -127 counts as 0
            scale_CN = (scale_CN.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        if FORMAT != "int":
            value_CJN = _floats(q_CJN, FORMAT)
        elif HAS_ZERO:
            zero_CN = tl.load(zero + at, mask=has_scale, other=0.0)
            value_CJN = q_CJN.to(tl.float32) - zero_CN[:, None, :]
        else:
            value_CJN = (q_CJN - (1 << (BITS - 1))).to(tl.float32)
        value_CJN = (value_CJN * scale_CN[:, None, :]).to(x.dtype.element_ty)
        column_1K = (word * COLUMNS + tl.arange(0, BLOCK_K))[None, :]
        # Columns that fill the last word may have any weight: x has 0 there.
        x_MK = tl.load(x_M1 + column_1K, mask=exists_M1 & (column_1K < inputs), other=0.0)
        value_KN = tl.reshape(value_CJN, [BLOCK_K, BLOCK_N])
        acc_MN += tl.dot(x_MK, value_KN, input_precision="ieee")

    if HAS_BIAS:
        bias_N = tl.load(bias + expert * outputs + output_N, mask=output_N < outputs, other=0.0)
        acc_MN += bias_N.to(tl.float32)[None, :]
    out_MN = out + (target_M * out_stride)[:, None] + output_N[None, :]
    exists_MN = exists_M1 & (output_N < outputs)[None, :]
    tl.store(out_MN, acc_MN.to(out.dtype.element_ty), mask=exists_MN)


def grouped_low_bit_triton(
    x_RI: torch.Tensor,
    weights: PackedWeights,
    tiles_T3: torch.Tensor,
    height: int,
    out_RO: torch.Tensor,
    index_R: torch.Tensor | None = None,
    *,
    scatter: bool = False,
    bias_eO: torch.Tensor | None = None,
) -> torch.Tensor:
    """Triton form of `grouped_low_bit`: same arguments and result."""
    num_tiles = tiles_T3.shape[0]
    if num_tiles == 0 or weights.outputs == 0:
        return out_RO
    x_RI = x_RI if x_RI.stride(1) == 1 else x_RI.contiguous()
    assert out_RO.stride(1) == 1 and out_RO.dtype == x_RI.dtype
    words, groups, scales = (
        weights.packed_ePCN.shape[2],
        weights.scale_ePGN.shape[2],
        weights.scale_ePGN.shape[3],
    )
    # Columns of a turn. float32 is multiplied without tensor cores, its operands in registers.
    single = x_RI.dtype == torch.float32
    columns = 32 if single else 64
    block_n = 32 if single else 64 if height == 16 else 128
    zero_ePGN = weights.zero_ePGN
    _grouped_low_bit_kernel[(num_tiles, triton.cdiv(weights.outputs, block_n))](
        x_RI,
        weights.packed_ePCN,
        weights.scale_ePGN,
        weights.scale_ePGN if zero_ePGN is None else zero_ePGN,
        weights.scale_ePGN if bias_eO is None else bias_eO.contiguous(),
        out_RO,
        tiles_T3 if index_R is None else index_R.contiguous(),
        tiles_T3,
        weights.outputs,
        weights.inputs,
        words,
        groups,
        weights.group,
        x_RI.stride(0),
        out_RO.stride(0),
        FORMAT=weights.format,
        BITS=weights.bits,
        SCALES=scales,
        HAS_ZERO=zero_ePGN is not None,
        HAS_BIAS=bias_eO is not None,
        ONE_GROUP=groups == 1 or weights.group % columns == 0,
        GATHER=index_R is not None and not scatter,
        SCATTER=index_R is not None and scatter,
        BLOCK_M=height,
        BLOCK_N=block_n,
        BLOCK_C=columns * weights.bits // 32,
        num_warps=8 if single else 4,
        num_stages=3,
    )
    return out_RO


@dataclass(frozen=True, slots=True)
class _Shapes:
    """Weights that have no memory."""

    format: Literal["int", "mxfp4", "fp8"]
    bits: int
    group: int
    outputs: int
    inputs: int
    packed_ePCN: torch.Tensor
    scale_ePGN: torch.Tensor
    zero_ePGN: torch.Tensor | None


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: every format with few and many rows, both ways of rows."""
    outputs, inputs, experts = 1536, 2048, 16

    def shapes(
        kind: Literal["int", "mxfp4", "fp8"],
        bits: int,
        group: int,
        scale: torch.dtype = torch.float32,
        scales: int = 16,
        has_zero: bool = False,
    ) -> PackedWeights:
        panels = (experts, outputs // 16)
        packed = meta(*panels, inputs * bits // 32, 16, dtype=torch.int32)
        scale_ePGN = meta(*panels, inputs // group, scales, dtype=scale)
        zero_ePGN = torch.empty_like(scale_ePGN) if has_zero else None
        return _Shapes(kind, bits, group, outputs, inputs, packed, scale_ePGN, zero_ePGN)

    def variant(
        name: str,
        weights: PackedWeights,
        dtype: torch.dtype,
        rows: int,
        way: str = "in place",
        has_bias: bool = False,
    ) -> Variant:
        bias_eO = meta(experts, outputs, dtype=dtype) if has_bias else None

        def call(num: int) -> None:
            index_R = None if way == "in place" else meta(3 * num, dtype=torch.int64)[num:]
            grouped_low_bit_triton(
                meta(2 * num, inputs, dtype=dtype),
                weights,
                meta(num, 3, dtype=torch.int32),
                rows,
                meta(2 * num, outputs, dtype=dtype),
                index_R,
                scatter=way == "scattered",
                bias_eO=bias_eO,
            )

        return Variant(f"{name}, {way}, tile {rows}", call)

    int4, bf16 = shapes("int", 4, 32), torch.bfloat16
    for rows in (16, 64):
        for name, dtype in DTYPES.items():
            yield variant(f"{name} int4", int4, dtype, rows, "gathered")
        yield variant("bf16 int4", int4, bf16, rows, "scattered")
        yield variant("bf16 int4", int4, bf16, rows)
        yield variant("bf16 int4 by 128, zeros", shapes("int", 4, 128, has_zero=True), bf16, rows)
        yield variant("bf16 int8", shapes("int", 8, 32), bf16, rows)
        mxfp4 = shapes("mxfp4", 4, 32, torch.uint8)
        yield variant("bf16 mxfp4", mxfp4, bf16, rows)
        yield variant("bf16 mxfp4, biases", mxfp4, bf16, rows, has_bias=True)
        yield variant("bf16 fp8 128x128", shapes("fp8", 8, 128, scales=1), bf16, rows)
        yield variant("bf16 fp8 per channel", shapes("fp8", 8, inputs), bf16, rows)
