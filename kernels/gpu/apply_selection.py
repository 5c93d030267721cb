"""apply_selection on CUDA: one Triton program per few tokens.

`apply_selection` imports this file only where Triton and a CUDA tensor are at hand.

Legend: T tokens, K top-k, E experts, e experts on this rank, M columns of the result.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import Variant, meta
from engine.ops.select_experts import SelectionRule


# What is kept may be a part of what all ranks keep.
@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["keep", "extra"])
def _apply_selection_kernel(
    keep,
    scores,
    topk_ids,
    topk_weights,
    extra,
    ids,
    weights,
    num_tokens,
    first_expert,
    eps,
    least,
    scale,
    keep_stride,
    scores_stride,
    extra_stride,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAD_C: tl.constexpr,
):
    token_T1 = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    present_T1 = token_T1 < num_tokens
    column_1C = tl.arange(0, PAD_C)[None, :]
    chosen_TC = present_T1 & (column_1C < TOP_K)
    id_TC = tl.load(topk_ids + token_T1 * TOP_K + column_1C, mask=chosen_TC, other=0)
    all_TC = tl.load(topk_weights + token_T1 * TOP_K + column_1C, mask=chosen_TC, other=0.0)
    kept_TC = tl.load(keep + token_T1 * keep_stride + column_1C, mask=chosen_TC, other=0) != 0
    id_TC = tl.where(kept_TC, id_TC, -1)
    weight_TC = tl.where(kept_TC, all_TC, 0.0)
    changed_TC = chosen_TC & (kept_TC == 0)
    if COLUMNS > TOP_K:
        extra_TC = present_T1 & (column_1C >= TOP_K) & (column_1C < COLUMNS)
        local_1C = column_1C - TOP_K
        added_TC = tl.load(extra + token_T1 * extra_stride + local_1C, mask=extra_TC, other=0) != 0
        expert_1C = first_expert + local_1C
        more_TC = tl.load(scores + token_T1 * scores_stride + expert_1C, mask=added_TC, other=0.0)
        if NORMALIZE:
            chosen_id_TC = tl.load(topk_ids + token_T1 * TOP_K + column_1C, mask=chosen_TC, other=0)
            at_TC = scores + token_T1 * scores_stride + chosen_id_TC
            sum_T = tl.sum(tl.load(at_TC, mask=chosen_TC, other=0.0), axis=1)
            sum_T1 = sum_T[:, None] + eps
            more_TC = more_TC / tl.where(sum_T1 < least, least, sum_T1)
        weight_TC = tl.where(added_TC, more_TC * scale, weight_TC)
        id_TC = tl.where(added_TC, expert_1C.to(tl.int64), id_TC)
        changed_TC |= added_TC
    if RENORMALIZE:
        kept_T = tl.sum(weight_TC, axis=1)
        changed_T = (tl.max(changed_TC.to(tl.int32), axis=1) > 0) & (kept_T > 0)
        # Divide first: the old sum over a tiny new one would overflow.
        rescaled_TC = weight_TC / tl.where(kept_T > 0, kept_T, 1.0)[:, None]
        rescaled_TC = rescaled_TC * tl.sum(all_TC, axis=1)[:, None]
        weight_TC = tl.where(changed_T[:, None], rescaled_TC, weight_TC)
    exists_TC = present_T1 & (column_1C < COLUMNS)
    at_TC = token_T1 * COLUMNS + column_1C
    tl.store(ids + at_TC, id_TC, mask=exists_TC)
    tl.store(weights + at_TC, weight_TC, mask=exists_TC)


def apply_selection_triton(
    keep_TK: torch.Tensor,
    scores_TE: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    rule: SelectionRule,
    first_expert: int,
    renormalize: bool,
    extra_Te: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of `apply_selection`: same arguments and results."""
    num_tokens, top_k = topk_ids_TK.shape
    columns = top_k if extra_Te is None else top_k + extra_Te.shape[1]
    ids_TM = topk_ids_TK.new_empty(num_tokens, columns)
    weights_TM = topk_weights_TK.new_empty(num_tokens, columns)
    if num_tokens == 0:
        return ids_TM, weights_TM
    keep_TK = keep_TK if keep_TK.stride(1) == 1 else keep_TK.contiguous()
    scores_TE = scores_TE if scores_TE.stride(1) == 1 else scores_TE.contiguous()
    extra = keep_TK if extra_Te is None else extra_Te
    extra = extra if extra.stride(1) == 1 else extra.contiguous()
    pad = triton.next_power_of_2(columns)
    block = max(1, min(64, 1024 // pad))
    _apply_selection_kernel[(triton.cdiv(num_tokens, block),)](
        keep_TK,
        scores_TE,
        topk_ids_TK.contiguous(),
        topk_weights_TK.contiguous(),
        extra,
        ids_TM,
        weights_TM,
        num_tokens,
        first_expert,
        rule.normalize_eps,
        rule.normalize_min,
        rule.scale,
        keep_TK.stride(0),
        scores_TE.stride(0),
        extra.stride(0),
        TOP_K=top_k,
        COLUMNS=columns,
        NORMALIZE=rule.normalize,
        RENORMALIZE=renormalize,
        BLOCK_T=block,
        PAD_C=pad,
    )
    return ids_TM, weights_TM


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: dropped alone, and with the extras of a rank's 4 experts."""

    def variant(name: str, num_experts: int, top_k: int, extras: int, *, again: bool) -> Variant:
        rule = SelectionRule(top_k, "softmax", normalize=True)

        def call(tokens: int) -> None:
            apply_selection_triton(
                meta(2, tokens, top_k, dtype=torch.bool)[1],
                meta(tokens, num_experts, dtype=torch.float32),
                meta(tokens, top_k, dtype=torch.int64),
                meta(tokens, top_k, dtype=torch.float32),
                rule,
                0,
                again,
                meta(tokens, extras, dtype=torch.bool) if extras else None,
            )

        return Variant(name, call)

    yield variant("top 2 of 8", 8, 2, 0, again=False)
    yield variant("top 2 of 8, renormalized", 8, 2, 0, again=True)
    yield variant("top 2 of 8, extras", 8, 2, 4, again=True)
    yield variant("top 8 of 128, extras", 128, 8, 16, again=True)
