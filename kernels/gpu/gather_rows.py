"""gather_rows on CUDA: rows copied as integers of 4 or 8 bytes, 16 bytes per thread.

`gather_rows` imports this file only where Triton and a CUDA tensor are at hand.

Legend: T tokens, N rows, D model dim.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import DTYPES, Variant, meta

# Integers that a row is copied as, the widest that divides its length, strides and addresses.
_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["index"])
def _gather_rows_kernel(
    x, index, out, num_rows, width, x_stride, out_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row_R = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists_R = row_R < num_rows
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    source_R = tl.load(index + row_R, mask=exists_R, other=0).to(tl.int64)
    exists = exists_R[:, None] & (column < width)
    part = tl.load(x + source_R[:, None] * x_stride + column, mask=exists)
    tl.store(out + row_R[:, None].to(tl.int64) * out_stride + column, part, mask=exists)


def _tiles(row_words: int, word_bytes: int) -> tuple[int, int, int]:
    """Return rows and words per program, and its warps: 16 bytes per thread and load."""
    block = min(triton.next_power_of_2(row_words), 4096 // word_bytes)
    return max(1, min(16, 2048 // (block * word_bytes))), block, 4


def gather_rows_triton(
    x_TD: torch.Tensor, index_N: torch.Tensor, out_ND: torch.Tensor | None = None
) -> torch.Tensor:
    """Triton form of `gather_rows`: same arguments and result."""
    num_rows, width = index_N.numel(), x_TD.shape[1]
    if out_ND is None:
        out_ND = x_TD.new_empty(num_rows, width)
    if num_rows == 0 or width == 0:
        return out_ND
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    assert out_ND.stride(1) == 1 and out_ND.dtype == x_TD.dtype
    x, out = as_words(x_TD, out_ND)
    rows, block, warps = _tiles(x.shape[1], x.element_size())
    _gather_rows_kernel[(triton.cdiv(num_rows, rows), triton.cdiv(x.shape[1], block))](
        x,
        index_N.contiguous(),
        out,
        num_rows,
        x.shape[1],
        x.stride(0),
        out.stride(0),
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return out_ND


def as_words(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return views [rows, words] of rows of equal length as the widest integers that all allow."""
    bits = 0
    for each in tensors:
        item = each.element_size()
        bits |= each.shape[1] * item | each.stride(0) * item | each.storage_offset() * item
    dtype = next(dtype for size, dtype in _WORDS if bits % size == 0)
    return [each.view(dtype) for each in tensors]


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: dim 4096 and 2048, and a row that is copied by 2 bytes."""

    def variant(name: str, dtype: torch.dtype, width: int) -> Variant:
        def call(rows: int) -> None:
            index_N = meta(3 * rows, dtype=torch.int64)[rows:]  # of a second chunk
            gather_rows_triton(meta(rows, width, dtype=dtype), index_N)

        return Variant(name, call)

    for name, dtype in DTYPES.items():
        yield variant(f"{name} dim 4096", dtype, 4096)
    yield variant("bf16 dim 2048", torch.bfloat16, 2048)
    yield variant("bf16 dim 2047", torch.bfloat16, 2047)
