"""silu_and_mul on CUDA: one Triton program a (row, run of columns), computed in float32.

`silu_and_mul` imports this file only where Triton and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit
def _silu_and_mul_kernel(gate_up, out, row_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    gate = tl.load(gate_up + row * row_stride + column, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + width + column, mask=exists, other=0.0)
    # Rounded where torch rounds: silu is an operator of its own there.
    activated = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty)
    tl.store(out + row * width + column, activated * up, mask=exists)


def silu_and_mul_triton(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """Triton form of `silu_and_mul`: same argument and result."""
    width = gate_up_R2F.shape[-1] // 2
    rows = gate_up_R2F.reshape(-1, 2 * width)
    out = gate_up_R2F.new_empty(*gate_up_R2F.shape[:-1], width)
    if out.numel() == 0:
        return out
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    block = min(1024, triton.next_power_of_2(width))
    grid = (rows.shape[0], triton.cdiv(width, block))
    _silu_and_mul_kernel[grid](rows, out, rows.stride(0), width, BLOCK=block)
    return out


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: the width of Mixtral-8x7B, and one that is no multiple of 16."""

    def variant(name: str, dtype: torch.dtype, width: int) -> Variant:
        return Variant(name, lambda rows: silu_and_mul_triton(meta(rows, 2 * width, dtype=dtype)))

    for name, dtype in DTYPES.items():
        yield variant(f"{name} width 14336", dtype, 14336)
    yield variant("bf16 width 1407", torch.bfloat16, 1407)
