"""make_claims on CUDA: one Triton program per few tokens writes the keys and codes of their claims.

`make_claims` imports this file only where Triton and a CUDA tensor are at hand.

Legend: T tokens, K top-k, E experts, e experts on this rank, X extra columns, C columns (K + X).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.claim_keys import random_start
from engine.ops.claims import ClaimRule
from engine.ops.gpu.variants import Variant, meta

_ORDERS = {"score": 0, "first": 1, "last": 2, "random": 3}


@triton.jit
def _mix(x, FIRST: tl.constexpr, SECOND: tl.constexpr):
    # The finaliser of SplitMix64; >> of signed numbers is arithmetic, so the sign is masked off.
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit(do_not_specialize=["num_tokens", "start"])
def _make_claims_kernel(
    scores,
    topk_ids,
    request_T,
    position_T,
    eligible_T,
    extra_pool,
    keys,
    codes,
    non_finite,
    num_tokens,
    num_experts,
    num_local,
    first_expert,
    scores_stride,
    start,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ORDER: tl.constexpr,
    WITH_EXPERT: tl.constexpr,
    SOME_ELIGIBLE: tl.constexpr,
    SOME_NONE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAD_C: tl.constexpr,
    PAD_E: tl.constexpr,
):
    token_T1 = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    present_T1 = token_T1 < num_tokens
    rows_T1 = scores + token_T1.to(tl.int64) * scores_stride
    expert_1E = tl.arange(0, PAD_E)[None, :]
    seen_TE = present_T1 & (expert_1E < num_experts)
    score_TE = tl.load(rows_T1 + expert_1E, mask=seen_TE, other=0.0)
    finite_TE = tl.abs(score_TE) < float("inf")
    bad = tl.sum(tl.sum(tl.where(finite_TE, 0, 1), axis=1), axis=0)
    tl.store(non_finite, 1, mask=bad > 0)

    column_1C = tl.arange(0, PAD_C)[None, :]
    exists_TC = present_T1 & (column_1C < COLUMNS)
    chosen_TC = present_T1 & (column_1C < TOP_K)
    code_TC = tl.load(topk_ids + token_T1 * TOP_K + column_1C, mask=chosen_TC, other=0)
    index_TC = code_TC
    scored_TC = chosen_TC
    if SOME_ELIGIBLE:
        eligible_T1 = tl.load(eligible_T + token_T1, mask=present_T1, other=0) != 0
        code_TC += tl.where(eligible_T1, 0, num_experts)
    if SOME_NONE:
        scored_TC = chosen_TC & (index_TC >= 0)
        code_TC = tl.where(index_TC < 0, 3 * num_experts, code_TC)
    if COLUMNS > TOP_K:
        local_TC = column_1C - TOP_K + token_T1 * 0
        is_local_TC = present_T1 & (local_TC >= 0) & (local_TC < num_local)
        pool_TC = tl.load(extra_pool + token_T1 * num_local + local_TC, mask=is_local_TC, other=-1)
        extra_TC = tl.where(
            pool_TC >= 0, 2 * num_experts + first_expert + local_TC, 3 * num_experts
        )
        code_TC = tl.where(chosen_TC, code_TC, extra_TC.to(tl.int64))
        index_TC = tl.where(is_local_TC, (first_expert + local_TC).to(tl.int64), index_TC)
        scored_TC |= is_local_TC
    at_TC = token_T1 * COLUMNS + column_1C
    tl.store(codes + at_TC, code_TC, mask=exists_TC)

    request_TC = tl.load(request_T + token_T1, mask=present_T1, other=0) + column_1C * 0
    position_TC = tl.load(position_T + token_T1, mask=present_T1, other=0) + column_1C * 0
    num_claims = num_tokens * COLUMNS
    if ORDER == 0:
        score_TC = tl.load(rows_T1 + index_TC, mask=scored_TC, other=0.0)
        score_TC = tl.where(score_TC == 0.0, 0.0, score_TC)  # -0.0 equals 0.0
        bits_TC = score_TC.to(tl.int32, bitcast=True)
        tl.store(keys + at_TC, bits_TC ^ ((bits_TC >> 31) & 0x7FFFFFFF), mask=exists_TC)
        keys += num_claims
    if ORDER == 3:
        id_TC = (request_TC.to(tl.int64) << 32) | (position_TC.to(tl.int64) & 0xFFFFFFFF)
        mixed_TC = _mix(id_TC ^ start.to(tl.int64), FIRST, SECOND) >> 32
        tl.store(keys + at_TC, mixed_TC.to(tl.int32), mask=exists_TC)
        keys += num_claims
    if ORDER == 2:
        tl.store(keys + at_TC, request_TC, mask=exists_TC)
        tl.store(keys + num_claims + at_TC, position_TC, mask=exists_TC)
    else:
        tl.store(keys + at_TC, ~request_TC, mask=exists_TC)
        tl.store(keys + num_claims + at_TC, ~position_TC, mask=exists_TC)
    if WITH_EXPERT:
        keys += 2 * num_claims
        tl.store(keys + at_TC, ~(code_TC % num_experts).to(tl.int32), mask=exists_TC)


def _tile(num_experts: int, columns: int) -> int:
    """Return the tokens per program: at most 2,048 numbers in a tile."""
    wide = triton.next_power_of_2(max(num_experts, columns))
    return max(1, min(16, 2048 // wide))


def make_claims_triton(
    scores_TE: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    request_T: torch.Tensor,
    position_T: torch.Tensor,
    rule: ClaimRule,
    eligible_T: torch.Tensor | None = None,
    extra_pool_Te: torch.Tensor | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Triton form of `make_claims`: same arguments and results."""
    num_tokens, num_experts = scores_TE.shape
    top_k, extras = topk_ids_TK.shape[1], extra_pool_Te is not None
    columns = top_k + rule.num_extra if extras else top_k
    num_keys = (2 if rule.order in ("first", "last") else 3) + rule.with_expert
    keys = scores_TE.new_empty(num_keys, num_tokens * columns, dtype=torch.int32)
    code_N = topk_ids_TK.new_empty(num_tokens * columns)
    non_finite = topk_ids_TK.new_zeros(1)
    if num_tokens == 0:
        return list(keys), code_N, non_finite
    block = _tile(num_experts, columns)
    _make_claims_kernel[(triton.cdiv(num_tokens, block),)](
        scores_TE if scores_TE.stride(1) == 1 else scores_TE.contiguous(),
        topk_ids_TK.contiguous(),
        request_T,
        position_T,
        request_T if eligible_T is None else eligible_T,
        code_N if extra_pool_Te is None else extra_pool_Te.contiguous(),
        keys,
        code_N,
        non_finite,
        num_tokens,
        num_experts,
        0 if extra_pool_Te is None else extra_pool_Te.shape[1],
        rule.first_expert,
        scores_TE.stride(0) if scores_TE.stride(1) == 1 else num_experts,
        random_start(rule.seed, rule.layer) if rule.order == "random" else 0,
        TOP_K=top_k,
        COLUMNS=columns,
        ORDER=_ORDERS[rule.order],
        WITH_EXPERT=rule.with_expert,
        SOME_ELIGIBLE=eligible_T is not None,
        SOME_NONE=rule.some_none,
        FIRST=0xBF58476D1CE4E5B9 - 2**64,
        SECOND=0x94D049BB133111EB - 2**64,
        BLOCK_T=block,
        PAD_C=triton.next_power_of_2(columns),
        PAD_E=triton.next_power_of_2(num_experts),
    )
    return list(keys), code_N, non_finite


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: every order, with and without extras."""

    def variant(name: str, num_experts: int, top_k: int, rule: ClaimRule) -> Variant:
        def call(tokens: int) -> None:
            extras = rule.num_extra
            make_claims_triton(
                meta(tokens, num_experts, dtype=torch.float32),
                meta(tokens, top_k, dtype=torch.int64),
                meta(tokens, dtype=torch.int32),
                meta(tokens, dtype=torch.int32),
                rule,
                meta(tokens, dtype=torch.bool) if extras else None,
                meta(tokens, extras, dtype=torch.int64) if extras else None,
            )

        return Variant(name, call)

    for order in _ORDERS:
        rule = ClaimRule(order, 1, 1, with_expert=False)
        yield variant(f"{order}, top 2 of 8", 8, 2, rule)
    rule = ClaimRule("score", 1, 1, with_expert=True, num_extra=4, first_expert=4)
    yield variant("score, extras, top 2 of 8", 8, 2, rule)
    yield variant("score, extras, top 8 of 128", 128, 8, rule)
    yield variant("score, some none, top 2 of 8", 8, 2, rule._replace(some_none=True))
