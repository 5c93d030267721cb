"""unpack_rows on CUDA: a Triton program gathers, scales and casts a run of one row.

`unpack_rows` imports this file only where Triton and a CUDA tensor are at hand.

Legend: V rows received, R assignments received, D model dim, L bytes of a packed row.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit
def from_float8(code):
    """Return the float32 numbers of bytes in E4M3."""
    code = code.to(tl.int32)
    size = code & 0x7F
    normal = ((size << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    number = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    number = tl.where(size == 0x7F, float("nan"), number)
    return tl.where(code >= 0x80, -number, number)


@triton.jit
def _unpack_rows_kernel(
    recv,
    scales,
    index_R,
    out,
    width,
    recv_stride,
    scales_stride,
    out_stride,
    SCALED: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    source = row
    if INDEXED:
        source = tl.load(index_R + row)
    part = tl.load(recv + source * recv_stride + column, mask=exists)
    if SCALED:
        part = from_float8(part) * tl.load(scales + source * scales_stride)
    tl.store(out + row * out_stride + column, part.to(out.dtype.element_ty), mask=exists)


def _tiles(width: int) -> tuple[int, int]:
    """Return columns and warps per program."""
    return min(2048, triton.next_power_of_2(width)), 4


def unpack_rows_triton(
    recv_VL: torch.Tensor,
    index_R: torch.Tensor | None,
    out_RD: torch.Tensor,
    payload: torch.dtype,
    scale_at: int,
) -> None:
    """Triton form of `unpack_rows`: same arguments."""
    num_rows, width = out_RD.shape
    if num_rows == 0:
        return
    assert out_RD.stride(1) == 1
    scaled = payload == torch.float8_e4m3fn
    recv = recv_VL if scaled else recv_VL.view(payload)
    scales = recv_VL[:, scale_at : scale_at + 4].view(torch.float32) if scaled else recv
    block, warps = _tiles(width)
    _unpack_rows_kernel[(num_rows, triton.cdiv(width, block))](
        recv,
        scales,
        recv if index_R is None else index_R,
        out_RD,
        width,
        recv.stride(0),
        scales.stride(0),
        out_RD.stride(0),
        SCALED=scaled,
        INDEXED=index_R is not None,
        BLOCK=block,
        num_warps=warps,
    )


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: from float8 to every dtype, and bfloat16 to float32."""

    def variant(name: str, dtype: torch.dtype, payload: torch.dtype, *, indexed: bool) -> Variant:
        def call(rows: int) -> None:
            scale_at = 4096 * payload.itemsize
            recv_VL = meta(rows, scale_at + 16, dtype=torch.uint8)
            index_R = meta(2 * rows, dtype=torch.int64) if indexed else None
            out_RD = meta(2 * rows if indexed else rows, 4096, dtype=dtype)
            unpack_rows_triton(recv_VL, index_R, out_RD, payload, scale_at)

        return Variant(name, call)

    for name, dtype in DTYPES.items():
        yield variant(f"fp8 to {name}, dim 4096", dtype, torch.float8_e4m3fn, indexed=True)
    yield variant("fp8 to bf16, in order", torch.bfloat16, torch.float8_e4m3fn, indexed=False)
    yield variant("bf16 to fp32, dim 4096", torch.float32, torch.bfloat16, indexed=True)
