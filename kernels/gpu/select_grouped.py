"""select_grouped on CUDA: radix selection in Triton, one program per pool and one launch.

A program finds the cut of its pool digit by digit, eight bits at a time: it counts the claims that
share the digits so far by their next one. It stops where the claims that are left all fit.

`select_top` imports this file only where Triton and a CUDA tensor are at hand.

Legend: N claims, P pools.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import Variant, meta

MOST_WORDS = 4
# Words are rows of one tensor, and `tied` follows the marks: where depends on how many there are.
UNALIGNED = [*(f"words_{index}" for index in range(MOST_WORDS)), "tied"]


@triton.jit
def _load_word(word, n, exists):
    # As an unsigned number, so that a digit is a shift and a mask.
    return tl.load(word + n, mask=exists, other=0).to(tl.int64) + 2147483648


@triton.jit
def _cut_of_word(
    words_0,
    words_1,
    words_2,
    words_3,
    cut_0,
    cut_1,
    cut_2,
    order,
    count,
    alive,
    left,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The cut in word INDEX, given those of the words before it: the digits that all of the best
    # share at the cut, then zeros.
    digit_D = tl.arange(0, 256)
    cut = tl.full([], 0, tl.int64)
    for step in range(4):
        if alive > left:
            shift = 24 - 8 * step
            hist_D = tl.zeros([256], tl.int32)
            for start in range(0, count, BLOCK):
                i = start + tl.arange(0, BLOCK)
                shares = i < count
                n = tl.load(order + i, mask=shares, other=0)
                if INDEX == 0:
                    word = _load_word(words_0, n, shares)
                else:
                    shares &= _load_word(words_0, n, shares) == cut_0
                if INDEX == 1:
                    word = _load_word(words_1, n, shares)
                elif INDEX > 1:
                    shares &= _load_word(words_1, n, shares) == cut_1
                if INDEX == 2:
                    word = _load_word(words_2, n, shares)
                elif INDEX > 2:
                    shares &= _load_word(words_2, n, shares) == cut_2
                    word = _load_word(words_3, n, shares)
                shares &= (word >> (shift + 8)) == (cut >> (shift + 8))
                digit = ((word >> shift) & 255).to(tl.int32)
                hist_D += tl.histogram(tl.where(shares, digit, 0), 256)
                hist_D -= tl.where(digit_D == 0, tl.sum((~shares).to(tl.int32), axis=0), 0)
            at_least_D = alive - tl.cumsum(hist_D, axis=0) + hist_D
            # The largest digit at which the pool is full.
            digit = tl.sum((at_least_D >= left).to(tl.int32), axis=0) - 1
            left -= tl.sum(tl.where(digit_D > digit, hist_D, 0), axis=0)
            alive = tl.sum(tl.where(digit_D == digit, hist_D, 0), axis=0)
            cut += digit.to(tl.int64) << shift
    return cut, alive, left


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _select_grouped_kernel(
    words_0,
    words_1,
    words_2,
    words_3,
    order,
    load_P,
    need_P,
    keep,
    tied,
    num_pools,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD_P: tl.constexpr,
):
    pool = tl.program_id(0)
    each_P = tl.arange(0, PAD_P)
    loads_P = tl.load(load_P + each_P, mask=each_P < num_pools, other=0)
    order += tl.sum(tl.where(each_P < pool, loads_P, 0), axis=0)
    count = tl.load(load_P + pool).to(tl.int32)
    # Claims that share the cut's digits so far, and slots left for them.
    alive = count
    left = tl.minimum(tl.load(need_P + pool), count.to(tl.int64)).to(tl.int32)
    cut_0 = tl.full([], 0, tl.int64)
    cut_1 = cut_0
    cut_2 = cut_0
    cut_3 = cut_0
    cut_0, alive, left = _cut_of_word(
        words_0, words_1, words_2, words_3, cut_0, cut_1, cut_2, order, count, alive, left, 0, BLOCK
    )
    if WORDS > 1:
        cut_1, alive, left = _cut_of_word(
            words_0,
            words_1,
            words_2,
            words_3,
            cut_0,
            cut_1,
            cut_2,
            order,
            count,
            alive,
            left,
            1,
            BLOCK,
        )
    if WORDS > 2:
        cut_2, alive, left = _cut_of_word(
            words_0,
            words_1,
            words_2,
            words_3,
            cut_0,
            cut_1,
            cut_2,
            order,
            count,
            alive,
            left,
            2,
            BLOCK,
        )
    if WORDS > 3:
        cut_3, alive, left = _cut_of_word(
            words_0,
            words_1,
            words_2,
            words_3,
            cut_0,
            cut_1,
            cut_2,
            order,
            count,
            alive,
            left,
            3,
            BLOCK,
        )
    too_many = alive > left
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        exists = i < count
        n = tl.load(order + i, mask=exists, other=0)
        word = _load_word(words_0, n, exists)
        above, equal = word > cut_0, word == cut_0
        if WORDS > 1:
            word = _load_word(words_1, n, exists)
            above |= equal & (word > cut_1)
            equal &= word == cut_1
        if WORDS > 2:
            word = _load_word(words_2, n, exists)
            above |= equal & (word > cut_2)
            equal &= word == cut_2
        if WORDS > 3:
            word = _load_word(words_3, n, exists)
            above |= equal & (word > cut_3)
            equal &= word == cut_3
        tl.store(keep + n, above | (equal & (too_many == 0)), mask=exists)
    tl.store(tied, True, mask=too_many & (left > 0))


def _tiles(num_claims: int, num_pools: int) -> tuple[int, int]:
    """Return the claims per pass of a program, and its warps."""
    return (2048, 4) if num_claims > 4096 * num_pools else (1024, 4)


def select_grouped_triton(
    order_N: torch.Tensor, load_P: torch.Tensor, need_P: torch.Tensor, words: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of `select_grouped`: same arguments and results, at most 4 words."""
    assert len(words) <= MOST_WORDS
    num_claims, num_pools = order_N.numel(), load_P.numel()
    marks = order_N.new_zeros(num_claims + 1, dtype=torch.bool)
    keep_N, tied = marks[:-1], marks[-1]
    if not num_claims or not num_pools:
        return keep_N, tied
    given = [word_N.contiguous() for word_N in words]
    block, warps = _tiles(num_claims, num_pools)
    _select_grouped_kernel[(num_pools,)](
        *given,
        *[given[0]] * (MOST_WORDS - len(given)),
        order_N,
        load_P,
        need_P,
        keep_N,
        tied,
        num_pools,
        WORDS=len(words),
        BLOCK=block,
        PAD_P=triton.next_power_of_2(num_pools),
        num_warps=warps,
    )
    return keep_N, tied


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: 2 to 4 words, 8 and 128 pools, with few claims and with many."""

    def variant(name: str, least: int, num_words: int, num_pools: int) -> Variant:
        def call(tokens: int) -> None:
            num_claims = least + tokens
            words = [*meta(num_words, num_claims, dtype=torch.int32)]
            load_P, need_P = (meta(num_pools, dtype=torch.int64) for _ in range(2))
            select_grouped_triton(meta(num_claims, dtype=torch.int64), load_P, need_P, words)

        return Variant(name, call)

    for num_words in (2, 3, 4):
        yield variant(f"{num_words} words, 8 pools", 0, num_words, 8)
    yield variant("3 words, 8 pools, many claims", 8 * 4096, 3, 8)
    yield variant("4 words, 128 pools", 0, 4, 128)
