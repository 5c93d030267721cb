"""add_zero_experts on CUDA: one Triton program per row.

`zero_experts` imports this file only where Triton and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit
def _add_zero_experts_kernel(rows, x, weight_T, out, rows_token, x_token, dim, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    exists = column < dim
    row_D = tl.load(rows + token * rows_token + column, mask=exists, other=0.0)
    x_D = tl.load(x + token * x_token + column, mask=exists, other=0.0).to(tl.float32)
    sum_D = row_D.to(tl.float32) + tl.load(weight_T + token) * x_D
    tl.store(out + token * dim + column, sum_D.to(row_D.dtype), mask=exists)


def add_zero_experts_triton(
    out_TD: torch.Tensor, x_TD: torch.Tensor, weight_T: torch.Tensor
) -> torch.Tensor:
    """Triton form of `add_zero_experts`: same arguments and result."""
    num_tokens, dim = out_TD.shape
    sum_TD = out_TD.new_empty(num_tokens, dim)
    if num_tokens == 0:
        return sum_TD
    out_TD, x_TD = (x if x.stride(1) == 1 else x.contiguous() for x in (out_TD, x_TD))
    block = triton.next_power_of_2(dim)
    _add_zero_experts_kernel[(num_tokens,)](
        out_TD,
        x_TD,
        weight_T,
        sum_TD,
        out_TD.stride(0),
        x_TD.stride(0),
        dim,
        BLOCK=block,
        num_warps=min(16, max(1, block // 256)),  # 8 columns per thread, 16 bytes in bfloat16
    )
    return sum_TD


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: the width of LongCat-Flash."""

    def variant(name: str, dtype: torch.dtype) -> Variant:
        def call(rows: int) -> None:
            out_TD, x_TD = meta(rows, 6144, dtype=dtype), meta(rows, 6144, dtype=dtype)
            add_zero_experts_triton(out_TD, x_TD, meta(rows, dtype=torch.float32))

        return Variant(f"{name} dim 6144", call)

    for name, dtype in DTYPES.items():
        yield variant(name, dtype)
