"""table_experts on CUDA: one Triton program a token, its scores in registers.

`table_experts` imports this file only where Triton and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.select_experts import score_logits
from engine.ops.gpu.variants import Variant, meta
from engine.ops.select_experts import SelectionRule


@triton.jit
def _table_experts_kernel(
    logits,
    table,
    token_ids,
    scores,
    ids,
    weights,
    logits_stride,
    num_experts,
    eps,
    least,
    scale,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    exists = expert < num_experts
    x = tl.load(logits + token * logits_stride + expert, mask=exists, other=-float("inf"))
    score = score_logits(x.to(tl.float32), exists, SCORE)
    tl.store(scores + token * num_experts + expert, score, mask=exists)

    place = tl.arange(0, BLOCK_K)
    row = table + tl.load(token_ids + token) * TOP_K
    chosen = tl.load(row + place, mask=place < TOP_K, other=0)
    chosen_score = tl.zeros([BLOCK_K], tl.float32)
    for k in range(TOP_K):
        of_k = tl.sum(tl.where(expert == tl.load(row + k), score, 0.0), axis=0)
        chosen_score = tl.where(place == k, of_k, chosen_score)
    weight = chosen_score
    if NORMALIZE:
        total = tl.sum(chosen_score, axis=0) + eps
        weight = weight / tl.where(total < least, least, total)
    weight = weight * scale
    tl.store(ids + token * TOP_K + place, chosen, mask=place < TOP_K)
    tl.store(weights + token * TOP_K + place, weight, mask=place < TOP_K)


def table_experts_triton(
    logits_TE: torch.Tensor, table_VK: torch.Tensor, token_ids_T: torch.Tensor, rule: SelectionRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton form of `table_experts`: same arguments and results."""
    (num_tokens, num_experts), top_k = logits_TE.shape, table_VK.shape[1]
    scores_TE = logits_TE.new_empty(num_tokens, num_experts, dtype=torch.float32)
    topk_ids_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.float32)
    if num_tokens == 0:
        return scores_TE, topk_ids_TK, weights_TK
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    _table_experts_kernel[(num_tokens,)](
        logits_TE,
        table_VK,
        token_ids_T,
        scores_TE,
        topk_ids_TK,
        weights_TK,
        logits_TE.stride(0),
        num_experts,
        rule.normalize_eps,
        rule.normalize_min,
        rule.scale,
        TOP_K=top_k,
        SCORE=rule.score,
        NORMALIZE=rule.normalize,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=triton.next_power_of_2(top_k),
    )
    return scores_TE, topk_ids_TK, weights_TK


def variants() -> Iterator[Variant]:
    """Yield the call to compile: DeepSeek-V4's."""
    rule = SelectionRule(6, "sqrt_softplus", normalize=True, normalize_eps=1e-20, scale=1.5)

    def call(tokens: int) -> None:
        logits_TE = meta(tokens, 256, dtype=torch.float32)
        table_VK = meta(129280, 6, dtype=torch.int64)
        table_experts_triton(logits_TE, table_VK, meta(tokens, dtype=torch.int64), rule)

    yield Variant("fp32 sqrt_softplus, 256 experts", call)
