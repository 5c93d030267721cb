"""pack_rows on CUDA: a Triton program gathers, scales, casts and writes one packed row.

The cast to float8_e4m3fn is made of integer operations: bit for bit torch's, on every GPU.

`pack_rows` imports this file only where Triton and a CUDA tensor are at hand.

Legend: T tokens, U rows sent, D model dim, L bytes of a packed row.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit
def to_float8(x):
    """Return the bytes of float32 numbers in E4M3, rounded to nearest, ties to even."""
    # Small numbers by an addition that shifts their bits into place; at 480 and above NaN (0x7F).
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    size = bits.to(tl.float32, bitcast=True)
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    normal = (bits + ((bits >> 20) & 1) + 0x7FFFF - 0x3C000000) >> 20
    code = tl.where(bits < 0x3C800000, small, normal)
    code = tl.where(bits >= 0x43F00000, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def to_saturated_float8(x):
    """Return the bytes of numbers in E4M3, those beyond its range as its largest number."""
    x = x.to(tl.float32)
    # Comparisons, not min and max: NaN stays NaN, as in torch.
    return to_float8(tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x)))


@triton.jit
def row_scale(part):
    """Return the largest magnitude of a row in float32 / 448."""
    largest = tl.max(tl.abs(part), axis=0)
    scale = tl.div_rn(largest, 448.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)
    # A maximum may pass over NaN.
    is_nan = tl.max((part != part).to(tl.int32), axis=0) > 0
    return tl.where(is_nan, float("nan"), scale)


@triton.jit(do_not_specialize_on_alignment=["token_U"])
def _pack_rows_kernel(
    x,
    token_U,
    out,
    scales,
    width,
    x_stride,
    out_stride,
    scales_stride,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    token = tl.load(token_U + row)
    part = tl.load(x + token * x_stride + column, mask=exists, other=0.0)
    out += row * out_stride + column
    if SCALED:
        part = part.to(tl.float32)
        scale = row_scale(part)
        code = to_float8(tl.div_rn(part, scale + tl.zeros([BLOCK], tl.float32)))
        tl.store(out, code, mask=exists)
        tl.store(scales + row * scales_stride, scale)
    else:
        tl.store(out, part.to(out.dtype.element_ty), mask=exists)


def _tiles(width: int, scaled: bool) -> tuple[int, int]:
    """Return columns and warps per program: a row that is scaled by itself is in one."""
    block = triton.next_power_of_2(width)
    block = block if scaled else min(block, 2048)
    return block, 4 if block <= 2048 else 8


def pack_rows_triton(
    x_TD: torch.Tensor,
    token_U: torch.Tensor,
    out_UL: torch.Tensor,
    payload: torch.dtype,
    scale_at: int,
) -> None:
    """Triton form of `pack_rows`: same arguments."""
    num_rows, width = token_U.numel(), x_TD.shape[1]
    if num_rows == 0:
        return
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    scaled = payload == torch.float8_e4m3fn
    out = out_UL if scaled else out_UL.view(payload)
    scales = out_UL[:, scale_at : scale_at + 4].view(torch.float32) if scaled else out
    block, warps = _tiles(width, scaled)
    _pack_rows_kernel[(num_rows, triton.cdiv(width, block))](
        x_TD,
        token_U,
        out,
        scales,
        width,
        x_TD.stride(0),
        out.stride(0),
        scales.stride(0),
        SCALED=scaled,
        BLOCK=block,
        num_warps=warps,
    )


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: to float8 from every dtype, and float32 to bfloat16."""

    def variant(name: str, dtype: torch.dtype, payload: torch.dtype, width: int) -> Variant:
        def call(rows: int) -> None:
            scale_at = width * payload.itemsize
            out_UL = meta(2 * rows, scale_at + 16, dtype=torch.uint8)
            token_U = meta(3 * rows, dtype=torch.int64)[rows:]  # of a second chunk
            pack_rows_triton(meta(rows, width, dtype=dtype), token_U, out_UL, payload, scale_at)

        return Variant(name, call)

    for name, dtype in DTYPES.items():
        yield variant(f"{name} to fp8, dim 4096", dtype, torch.float8_e4m3fn, 4096)
    yield variant("bf16 to fp8, dim 2048", torch.bfloat16, torch.float8_e4m3fn, 2048)
    yield variant("fp32 to bf16, dim 4096", torch.float32, torch.bfloat16, 4096)
