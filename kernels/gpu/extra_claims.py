"""extra_claims on CUDA: one Triton program per token, this rank's experts in registers.

`extra_claims` imports this file only where Triton and a CUDA tensor are at hand.

Legend: T tokens, K top-k, E experts, e experts on this rank, P pools.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.claims import ExtraRule
from engine.ops.gpu.variants import Variant, meta


# What is kept may be a part of what all ranks keep.
@triton.jit(do_not_specialize=["num_claims"], do_not_specialize_on_alignment=["keep"])
def _extra_claims_kernel(
    scores,
    topk_ids,
    request_T,
    position_T,
    pool_e,
    eligible_T,
    free_P,
    keep,
    pools,
    keys,
    num_local,
    first_expert,
    budget,
    scores_stride,
    keep_stride,
    num_claims,
    TOP_K: tl.constexpr,
    SOME_ELIGIBLE: tl.constexpr,
    SOME_FREE: tl.constexpr,
    ONLY_LOST: tl.constexpr,
    WITH_KEYS: tl.constexpr,
    PAD_e: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, PAD_e)
    exists = local < num_local
    score = tl.load(scores + token * scores_stride + first_expert + local, mask=exists, other=0.0)
    pool = tl.load(pool_e + local, mask=exists, other=-1)
    allowed = exists
    lost = 0
    for k in tl.static_range(TOP_K):
        allowed &= first_expert + local != tl.load(topk_ids + token * TOP_K + k)
        if ONLY_LOST:
            lost += (tl.load(keep + token * keep_stride + k) == 0).to(tl.int32)
    if SOME_ELIGIBLE:
        allowed &= tl.load(eligible_T + token) != 0
    if SOME_FREE:
        allowed &= tl.load(free_P + pool, mask=exists, other=0) > 0
    wanted = allowed
    if ONLY_LOST:
        budget = tl.minimum(budget, lost)
    if budget < num_local:
        wanted = allowed & (local < 0)
        for _ in range(budget):
            left = allowed & (wanted == 0)
            best = tl.max(tl.where(left, score, -float("inf")), axis=0)
            # The lower expert of equal scores.
            winner = tl.min(tl.where(left & (score == best), local, PAD_e), axis=0)
            wanted |= local == winner
    tl.store(pools + token * num_local + local, tl.where(wanted, pool, -1), mask=exists)
    if WITH_KEYS:
        keys += token * num_local + local
        score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
        bits = score.to(tl.int32, bitcast=True)
        tl.store(keys, bits ^ ((bits >> 31) & 0x7FFFFFFF), mask=exists)
        request = tl.load(request_T + token) + local * 0
        position = tl.load(position_T + token) + local * 0
        tl.store(keys + num_claims, ~request, mask=exists)
        tl.store(keys + 2 * num_claims, ~position, mask=exists)
        tl.store(keys + 3 * num_claims, ~local, mask=exists)


def extra_claims_triton(
    scores_TE: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    request_T: torch.Tensor,
    position_T: torch.Tensor,
    pool_e: torch.Tensor,
    rule: ExtraRule,
    eligible_T: torch.Tensor | None = None,
    free_P: torch.Tensor | None = None,
    keep_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Triton form of `extra_claims`: same arguments and results."""
    num_tokens, num_local = scores_TE.shape[0], pool_e.numel()
    pool_Te = pool_e.new_empty(num_tokens, num_local)
    keys = pool_e.new_empty(4 * rule.with_keys, num_tokens * num_local, dtype=torch.int32)
    if num_tokens == 0 or num_local == 0:
        return pool_Te, list(keys)
    scores_TE = scores_TE if scores_TE.stride(1) == 1 else scores_TE.contiguous()
    if keep_TK is not None and keep_TK.stride(1) != 1:
        keep_TK = keep_TK.contiguous()
    _extra_claims_kernel[(num_tokens,)](
        scores_TE,
        topk_ids_TK.contiguous(),
        request_T,
        position_T,
        pool_e,
        request_T if eligible_T is None else eligible_T,
        pool_e if free_P is None else free_P,
        request_T if keep_TK is None else keep_TK,
        pool_Te,
        keys,
        num_local,
        rule.first_expert,
        min(rule.budget, num_local),
        scores_TE.stride(0),
        0 if keep_TK is None else keep_TK.stride(0),
        num_tokens * num_local,
        TOP_K=topk_ids_TK.shape[1],
        SOME_ELIGIBLE=eligible_T is not None,
        SOME_FREE=free_P is not None,
        ONLY_LOST=keep_TK is not None,
        WITH_KEYS=rule.with_keys,
        PAD_e=triton.next_power_of_2(num_local),
        num_warps=1,
    )
    return pool_Te, list(keys)


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: all experts of a rank or some, with keys and without."""

    def variant(name: str, rule: ExtraRule, *, is_second: bool) -> Variant:
        def call(tokens: int) -> None:
            extra_claims_triton(
                meta(tokens, 8, dtype=torch.float32),
                meta(tokens, 2, dtype=torch.int64),
                meta(tokens, dtype=torch.int32),
                meta(tokens, dtype=torch.int32),
                meta(4, dtype=torch.int64),
                rule,
                meta(tokens, dtype=torch.bool),
                meta(8, dtype=torch.int64) if is_second else None,
                meta(2, tokens, 2, dtype=torch.bool)[1] if is_second else None,
            )

        return Variant(name, call)

    yield variant("all of 4 experts", ExtraRule(4, 4), is_second=False)
    yield variant("2 of 4 experts", ExtraRule(4, 2), is_second=False)
    yield variant("2 of 4, free slots", ExtraRule(4, 2, with_keys=False), is_second=True)
