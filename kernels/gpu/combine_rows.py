"""combine_rows on CUDA: one Triton program a (token, run of columns), terms added in order of k.

`combine_rows` imports this file only where Triton and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit
def _combine_rows_kernel(
    rows,
    slot_TK,
    weights_TK,
    out,
    rows_stride,
    dim,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for k in range(TOP_K):
        slot = tl.load(slot_TK + token * TOP_K + k)
        weight = tl.load(weights_TK + token * TOP_K + k).to(tl.float32)
        present = slot >= 0
        # An absent slot has no columns. Triton 3.9's interpreter refuses a mask of scalar & block.
        end = tl.where(present, dim, 0)
        row = tl.load(rows + slot * rows_stride + column, mask=column < end, other=0.0)
        # where, not a product with zero: the weight of an absent slot may be anything.
        acc += tl.where(present, weight * row.to(tl.float32), 0.0)
    tl.store(out + token * dim + column, acc.to(out.dtype.element_ty), mask=column < dim)


def combine_rows_triton(
    rows_ND: torch.Tensor, slot_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Triton form of `combine_rows`: same arguments and result."""
    num_tokens, top_k = slot_TK.shape
    dim = rows_ND.shape[1]
    out_TD = rows_ND.new_empty(num_tokens, dim)
    if num_tokens == 0:
        return out_TD
    rows_ND = rows_ND if rows_ND.stride(1) == 1 else rows_ND.contiguous()
    block = min(1024, triton.next_power_of_2(dim))
    _combine_rows_kernel[(num_tokens, triton.cdiv(dim, block))](
        rows_ND,
        slot_TK.contiguous(),
        weights_TK.contiguous(),
        out_TD,
        rows_ND.stride(0),
        dim,
        TOP_K=top_k,
        BLOCK=block,
    )
    return out_TD


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: 2 and 8 experts per token."""

    def variant(name: str, dtype: torch.dtype, top_k: int, dim: int) -> Variant:
        def call(tokens: int) -> None:
            combine_rows_triton(
                meta(tokens * top_k, dim, dtype=dtype),
                meta(tokens, top_k, dtype=torch.int64),
                meta(tokens, top_k, dtype=torch.float32),
            )

        return Variant(name, call)

    for name, dtype in DTYPES.items():
        yield variant(f"{name} top 2, dim 4096", dtype, 2, 4096)
    yield variant("bf16 top 8, dim 2048", torch.bfloat16, 8, 2048)
