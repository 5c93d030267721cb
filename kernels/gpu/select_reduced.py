"""select_reduced on CUDA: radix selection over all ranks, in Triton.

For each digit one launch counts this rank's claims, the counts are added up over ranks, and one
launch with a program per pool finds the cut, which is the same on every rank. A last launch marks
what lies above. Counts are integers, so the order of atomic additions does not matter.

`select_top` imports this file only where Triton and a CUDA tensor are at hand.

Legend: N claims of this rank, P pools.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import triton
import triton.language as tl

from engine.ops.gpu.select_grouped import MOST_WORDS, UNALIGNED
from engine.ops.gpu.variants import Variant, meta

_BLOCK = 1024


@triton.jit
def _word(words, n, exists):
    # As an unsigned number, so that a digit is a shift and a mask.
    return tl.load(words + n, mask=exists, other=0).to(tl.int64) + 2147483648


@triton.jit(
    do_not_specialize=["num_claims", "shift"], do_not_specialize_on_alignment=UNALIGNED[:-1]
)
def _count_kernel(
    words_0,
    words_1,
    words_2,
    words_3,
    pool_N,
    cuts,
    counts,
    num_claims,
    num_pools,
    shift,
    INDEX: tl.constexpr,
    LEADING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pool = tl.load(pool_N + n, mask=n < num_claims, other=-1)
    shares = pool >= 0
    cuts += tl.where(shares, pool, 0)
    if INDEX > 0:
        shares &= _word(words_0, n, shares) == tl.load(cuts, mask=shares, other=0)
    if INDEX > 1:
        shares &= _word(words_1, n, shares) == tl.load(cuts + num_pools, mask=shares, other=0)
    if INDEX > 2:
        shares &= _word(words_2, n, shares) == tl.load(cuts + 2 * num_pools, mask=shares, other=0)
    if INDEX == 0:
        word = _word(words_0, n, shares)
    elif INDEX == 1:
        word = _word(words_1, n, shares)
    elif INDEX == 2:
        word = _word(words_2, n, shares)
    else:
        word = _word(words_3, n, shares)
    if not LEADING:
        cut = tl.load(cuts + INDEX * num_pools, mask=shares, other=0)
        shares &= (word >> (shift + 8)) == (cut >> (shift + 8))
    digit = (word >> shift) & 255
    tl.atomic_add(counts + pool * 256 + digit, 1, mask=shares)


@triton.jit(do_not_specialize=["shift"])
def _cut_kernel(
    counts,
    need_P,
    left_P,
    alive_P,
    cuts,
    num_pools,
    shift,
    INDEX: tl.constexpr,
    LEADING: tl.constexpr,
):
    pool = tl.program_id(0)
    digit_D = tl.arange(0, 256)
    hist_D = tl.load(counts + pool * 256 + digit_D)
    tl.store(counts + pool * 256 + digit_D, tl.zeros([256], tl.int32))  # for the next digit
    alive = tl.sum(hist_D, axis=0)
    if LEADING and INDEX == 0:
        left = tl.load(need_P + pool)
    else:
        left = tl.load(left_P + pool)
    # A pool that is never full keeps all.
    left = tl.minimum(left, alive.to(tl.int64))
    at_least_D = alive - tl.cumsum(hist_D, axis=0) + hist_D
    digit = tl.sum((at_least_D >= left).to(tl.int32), axis=0) - 1
    left -= tl.sum(tl.where(digit_D > digit, hist_D, 0), axis=0)
    alive = tl.sum(tl.where(digit_D == digit, hist_D, 0), axis=0)
    cut = digit.to(tl.int64) << shift
    if not LEADING:
        cut += tl.load(cuts + INDEX * num_pools + pool)
    tl.store(cuts + INDEX * num_pools + pool, cut)
    tl.store(left_P + pool, left)
    tl.store(alive_P + pool, alive.to(tl.int64))


@triton.jit(do_not_specialize=["num_claims"], do_not_specialize_on_alignment=UNALIGNED)
def _mark_kernel(
    words_0,
    words_1,
    words_2,
    words_3,
    pool_N,
    left_P,
    alive_P,
    cuts,
    keep,
    tied,
    num_claims,
    num_pools,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD_P: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pool = tl.load(pool_N + n, mask=n < num_claims, other=-1)
    exists = pool >= 0
    cuts += tl.where(exists, pool, 0)
    word, cut = _word(words_0, n, exists), tl.load(cuts, mask=exists, other=0)
    above, equal = exists & (word > cut), exists & (word == cut)
    if WORDS > 1:
        word = _word(words_1, n, exists)
        cut = tl.load(cuts + num_pools, mask=exists, other=0)
        above |= equal & (word > cut)
        equal &= word == cut
    if WORDS > 2:
        word = _word(words_2, n, exists)
        cut = tl.load(cuts + 2 * num_pools, mask=exists, other=0)
        above |= equal & (word > cut)
        equal &= word == cut
    if WORDS > 3:
        word = _word(words_3, n, exists)
        cut = tl.load(cuts + 3 * num_pools, mask=exists, other=0)
        above |= equal & (word > cut)
        equal &= word == cut
    alive = tl.load(alive_P + pool, mask=equal, other=1)
    left = tl.load(left_P + pool, mask=equal, other=0)
    tl.store(keep + n, above | (equal & (alive <= left)), mask=n < num_claims)
    if tl.program_id(0) == 0:
        each_P = tl.arange(0, PAD_P)
        all_alive_P = tl.load(alive_P + each_P, mask=each_P < num_pools, other=0)
        all_left_P = tl.load(left_P + each_P, mask=each_P < num_pools, other=0)
        is_tied_P = (all_left_P > 0) & (all_alive_P > all_left_P)
        tl.store(tied, tl.max(is_tied_P.to(tl.int32), axis=0) > 0)


def select_reduced_triton(
    words: Sequence[torch.Tensor],
    pool_N: torch.Tensor,
    need_P: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of `select_reduced`: same arguments and results, at most 4 words."""
    assert len(words) <= MOST_WORDS
    num_claims, num_pools = pool_N.numel(), need_P.numel()
    pointers = [word_N.contiguous() for word_N in words]
    pointers += [pointers[0]] * (MOST_WORDS - len(words))
    counts = pool_N.new_zeros(num_pools * 256, dtype=torch.int32)
    state = pool_N.new_empty(2 + len(words), num_pools)
    left_P, alive_P, cuts = state[0], state[1], state[2:]
    num_blocks = triton.cdiv(num_claims, _BLOCK)
    for index in range(len(words)):
        for shift in (24, 16, 8, 0):
            options = {"INDEX": index, "LEADING": shift == 24}
            if num_blocks:
                _count_kernel[(num_blocks,)](
                    *pointers,
                    pool_N,
                    cuts,
                    counts,
                    num_claims,
                    num_pools,
                    shift,
                    **options,
                    BLOCK=_BLOCK,
                )
            counts = reduce(counts)
            _cut_kernel[(num_pools,)](
                counts, need_P, left_P, alive_P, cuts, num_pools, shift, **options
            )
    marks = pool_N.new_empty(num_claims + 1, dtype=torch.bool)
    _mark_kernel[(max(1, num_blocks),)](
        *pointers,
        pool_N,
        left_P,
        alive_P,
        cuts,
        marks,
        marks[-1:],
        num_claims,
        num_pools,
        WORDS=len(words),
        BLOCK=_BLOCK,
        PAD_P=triton.next_power_of_2(num_pools),
    )
    return marks[:-1], marks[-1]


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: 3 and 4 words."""

    def variant(num_words: int, num_pools: int) -> Variant:
        def call(claims: int) -> None:
            words = [*meta(num_words, claims, dtype=torch.int32)]
            pool_N, need_P = meta(claims, dtype=torch.int64), meta(num_pools, dtype=torch.int64)
            select_reduced_triton(words, pool_N, need_P, lambda counts: counts)

        return Variant(f"{num_words} words, {num_pools} pools", call)

    yield variant(3, 8)
    yield variant(4, 128)
