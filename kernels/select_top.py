"""The best `need` claims of every pool, exactly: radix selection, most significant digit first.

A claim is ranked by a list of int32 words, compared one after the other, larger first. No sort: a
pass counts the claims of each pool by their next eight bits, finds the digit at which the pool is
full, keeps what lies above it and goes on with the claims that share it. The same passes serve one
rank alone and, with the histograms added up over ranks (`reduce`), a selection over all of them.

Legend: N claims, P pools, W ranks.
"""

from collections.abc import Callable, Sequence

import torch

from engine.ops import native, triton_support
from engine.ops.sort_by_expert import sort_by_expert

DIGITS = 256
_SHIFTS = (24, 16, 8, 0)
PASSES_A_WORD = len(_SHIFTS)


def select_top(
    words: Sequence[torch.Tensor], pool_N: torch.Tensor, need_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Marks the best need_P claims of each pool. words: int32 [N] each, most significant first.

    pool_N: int64 [N], the pool a claim is in, -1 for none. need_P: int64 [P], at least 0; a pool
    with fewer claims keeps them all. Returns keep_N (bool) and tied (bool, a scalar tensor): equal
    words at the cut of some pool. Of such a pool's equal claims none is marked.
    """
    if pool_N.is_cpu and native.available():
        return torch.ops.lockstep_cpu.select_top(list(words), pool_N, need_P)
    if triton_support.serves(pool_N):
        order_N, _, load_P = sort_by_expert(pool_N[:, None], need_P.numel())
        return select_grouped(order_N, load_P, need_P, words)
    if pool_N.is_cuda:
        return select_top_sorted(words, pool_N, need_P)
    return select_top_reference(words, pool_N, need_P)


def select_grouped(
    order_N: torch.Tensor, load_P: torch.Tensor, need_P: torch.Tensor, words: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_top` of claims that are grouped by pool.

    order_N: int64, the claims of pool 0, of pool 1, ...; behind those of the last pool the entries
    mean nothing. load_P: int64, claims of each pool.
    """
    if triton_support.serves(order_N):
        from engine.ops.gpu.select_grouped import select_grouped_triton

        return select_grouped_triton(order_N, load_P, need_P, words)
    return select_grouped_reference(order_N, load_P, need_P, words)


def select_grouped_reference(
    order_N: torch.Tensor, load_P: torch.Tensor, need_P: torch.Tensor, words: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch form of `select_grouped`."""
    num_claims, num_pools = order_N.numel(), load_P.numel()
    place_N = torch.arange(num_claims, device=order_N.device)
    pool_N = torch.searchsorted(load_P.cumsum(0), place_N, right=True)
    # One entry more takes the claims of no pool.
    pool_N1 = order_N.new_full((num_claims + 1,), -1)
    pool_N1.scatter_(0, order_N.where(pool_N < num_pools, num_claims), pool_N)
    return select_top_reference(words, pool_N1[:-1], need_P)


def select_reduced(
    words: Sequence[torch.Tensor],
    pool_N: torch.Tensor,
    need_P: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_top` over the claims of all ranks: each marks its own, `tied` is the same on all.

    reduce: adds int32 histograms [P * 256] up over ranks; called four times a word, on every rank.
    """
    if triton_support.serves(pool_N):
        from engine.ops.gpu.select_reduced import select_reduced_triton

        return select_reduced_triton(words, pool_N, need_P, reduce)
    return select_top_reference(words, pool_N, need_P, reduce)


def select_top_sorted(
    words: Sequence[torch.Tensor], pool_N: torch.Tensor, need_P: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`select_top` by stable sorts, without a host sync: the form with the fewest kernel launches.

    One sort a word, the least significant first, the last by pool and leading word together.
    """
    num_pools, num_claims = need_P.numel(), pool_N.numel()
    if not num_claims:
        return pool_N.bool(), need_P.new_zeros((), dtype=torch.bool)
    order_N = torch.arange(num_claims, device=pool_N.device)
    for word_N in reversed(words[1:]):
        order_N = order_N[(~word_N[order_N]).argsort(stable=True)]
    row_N = pool_N.where(pool_N >= 0, num_pools)[order_N]
    # ~word is smallest for the largest word; moved into 0 .. 2**32 - 1 it leaves the pool intact.
    key_N = row_N.bitwise_left_shift(32) + ((~words[0][order_N]).long() + 2**31)
    key_N, place_N = key_N.sort(stable=True)
    order_N, row_N = order_N[place_N], key_N.bitwise_right_shift(32)
    pools_P = torch.arange(num_pools + 1, device=pool_N.device)
    first_P = torch.searchsorted(row_N, pools_P)
    need_P = torch.cat((need_P, need_P.new_zeros(1)))  # of claims in no pool nothing stays
    rank_N = torch.arange(num_claims, device=pool_N.device) - first_P[row_N]
    keep_N = rank_N < need_P[row_N]
    # The last claim that stays, and the one after it: equal words mean a tie.
    last_P = (first_P + need_P - 1).clamp(0, num_claims - 1)
    next_P = (first_P + need_P).clamp(0, num_claims - 1)
    tied_P = (need_P > 0) & (row_N[last_P] == pools_P) & (row_N[next_P] == pools_P)
    tied_P &= last_P != next_P
    like_cut_N = torch.ones_like(keep_N)
    for word_N in words:
        sorted_N = word_N[order_N]
        tied_P = tied_P & (sorted_N[last_P] == sorted_N[next_P])
        like_cut_N &= sorted_N == sorted_N[last_P][row_N]
    keep_N &= ~(tied_P[row_N] & like_cut_N)
    return torch.zeros_like(keep_N).scatter_(0, order_N, keep_N), tied_P.any()


def select_top_reference(
    words: Sequence[torch.Tensor],
    pool_N: torch.Tensor,
    need_P: torch.Tensor,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch form of `select_top`, without a host sync.

    reduce: adds int32 histograms [P * 256] up over ranks; called four times a word, so that all
    ranks find the same cut and each marks its own claims.
    """
    num_pools = need_P.numel()
    alive_N = pool_N >= 0
    row_N = pool_N.clamp(min=0)
    keep_N = torch.zeros_like(alive_N)
    last_P = torch.zeros_like(need_P)
    for word_N in words:
        unsigned_N = word_N.long() + 2**31
        for shift in _SHIFTS:
            digit_N = unsigned_N.bitwise_right_shift(shift).bitwise_and(DIGITS - 1)
            count = torch.zeros(num_pools * DIGITS, dtype=torch.int32, device=pool_N.device)
            count.scatter_add_(0, row_N * DIGITS + digit_N, alive_N.to(torch.int32))
            if reduce is not None:
                count = reduce(count)
            # at_least[p, d]: claims of pool p with this digit at least d; one column past the end.
            at_least = count.view(num_pools, DIGITS).flip(1).cumsum(1).flip(1)
            at_least = torch.nn.functional.pad(at_least, (0, 1))
            # The largest digit at which the pool is full; -1 where it never is, and all are kept.
            cut_P1 = (at_least[:, :DIGITS] >= need_P[:, None]).sum(1, keepdim=True) - 1
            above_P = at_least.gather(1, cut_P1 + 1).squeeze(1)
            last_P = at_least.gather(1, cut_P1.clamp(min=0)).squeeze(1) - above_P
            last_P = last_P.where(cut_P1.squeeze(1) >= 0, 0)
            cut_N = cut_P1.squeeze(1)[row_N]
            keep_N |= alive_N & (digit_N > cut_N)
            alive_N = alive_N & (digit_N == cut_N)
            need_P = need_P - above_P
    tied_P = (last_P > need_P) & (need_P > 0)
    fits_P = (need_P > 0) & ~tied_P
    return keep_N | (alive_N & fits_P[row_N]), tied_P.any()


def quotas(claims_WP: torch.Tensor, limit_P: torch.Tensor) -> torch.Tensor:
    """Partition min(claims, limit) slots of each pool in proportion to the ranks' claims; return
    int64 [W, P].

    claims_WP, limit_P: int64. Largest remainder, ties to the lower rank; exact integers.
    """
    if triton_support.serves(claims_WP):
        from engine.ops.gpu.quotas import quotas_triton

        return quotas_triton(claims_WP, limit_P)
    return quotas_reference(claims_WP, limit_P)


def quotas_reference(claims_WP: torch.Tensor, limit_P: torch.Tensor) -> torch.Tensor:
    """Plain torch form of `quotas`."""
    total_P = claims_WP.sum(0)
    slots_P = total_P.minimum(limit_P)
    scaled_WP = claims_WP * slots_P
    divisor_P = total_P.clamp(min=1)
    quota_WP = scaled_WP.div(divisor_P, rounding_mode="floor")
    # One more slot each for the ranks with the largest remainders, until none is left.
    left_P = slots_P - quota_WP.sum(0)
    order_WP = (scaled_WP % divisor_P).argsort(dim=0, descending=True, stable=True)
    ranks_WP = torch.arange(len(claims_WP), device=claims_WP.device)[:, None].expand_as(order_WP)
    rank_order_WP = torch.empty_like(order_WP).scatter_(0, order_WP, ranks_WP)
    return quota_WP + (rank_order_WP < left_P)
