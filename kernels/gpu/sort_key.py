"""sort_key on CUDA: one Triton program per run of claims.

`sort_key` imports this file only where Triton and a CUDA tensor are at hand.

Legend: N claims, W ranks, B claims of a rank.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import Variant, meta


# Sizes, strides and addresses depend on how many claims there are.
@triton.jit(
    do_not_specialize=["num_claims", "size", "high_stride", "low_stride"],
    do_not_specialize_on_alignment=["high", "low", "order"],
)
def _sort_key_kernel(
    high,
    low,
    order,
    key,
    num_claims,
    size,
    high_stride,
    low_stride,
    IS_PAIR: tl.constexpr,
    IS_ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = n < num_claims
    claim = tl.load(order + n, mask=exists, other=0) if IS_ORDERED else n
    rank, index = claim // size, claim % size
    low_N = tl.load(low + rank * low_stride + index, mask=exists, other=0)
    # The lower word is moved into 0 .. 2**32 - 1.
    key_N = (~low_N).to(tl.int64) + 2147483648
    if IS_PAIR:
        high_N = tl.load(high + rank * high_stride + index, mask=exists, other=0)
        key_N += (~high_N).to(tl.int64) << 32
    tl.store(key + n, key_N, mask=exists)


def sort_key_triton(
    words: Sequence[torch.Tensor], order_N: torch.Tensor | None = None
) -> torch.Tensor:
    """Triton form of `sort_key`: same arguments and results."""
    high, low = (_rows(word) for word in (words[0], words[-1]))
    num_claims = low.numel()
    key_N = low.new_empty(num_claims, dtype=torch.int64)
    if not num_claims:
        return key_N
    block = 512
    _sort_key_kernel[(triton.cdiv(num_claims, block),)](
        high,
        low,
        key_N if order_N is None else order_N,
        key_N,
        num_claims,
        low.shape[1],
        high.stride(0),
        low.stride(0),
        IS_PAIR=len(words) == 2,
        IS_ORDERED=order_N is not None,
        BLOCK=block,
        num_warps=4,
    )
    return key_N


def _rows(word: torch.Tensor) -> torch.Tensor:
    """Return [N] as [1, N], and rows whose numbers lie side by side."""
    word = word if word.dim() == 2 else word[None]
    return word if word.stride(1) == 1 else word.contiguous()


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: the last words and the first, an odd one alone."""

    def variant(name: str, num_words: int, is_ordered: bool) -> Variant:
        def call(claims: int) -> None:
            gathered = meta(2, 5 * claims, dtype=torch.int32)
            words = [gathered[:, index * claims :][:, :claims] for index in range(num_words)]
            sort_key_triton(words, meta(2 * claims, dtype=torch.int64) if is_ordered else None)

        return Variant(name, call)

    yield variant("the last two words", 2, is_ordered=False)
    yield variant("two words in order", 2, is_ordered=True)
    yield variant("one word in order", 1, is_ordered=True)
    yield variant("one word", 1, is_ordered=False)
