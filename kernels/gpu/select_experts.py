"""select_experts on CUDA: one Triton program a token, its scores in registers.

`select_experts` imports this file only where Triton and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import Variant, meta
from engine.ops.select_experts import SelectionRule


@triton.jit
def score_logits(x, exists, SCORE: tl.constexpr):
    """Return the scores of one token's logits, float32; what does not exist is -inf in them."""
    if SCORE == "softmax":
        e = tl.exp(x - tl.max(x, axis=0))
        score = e / tl.sum(tl.where(exists, e, 0.0), axis=0)
    elif SCORE == "sigmoid":
        score = 1.0 / (1.0 + tl.exp(-x))
    else:
        # log(1 + e^x) without the loss of log near 1, by the larger of its two terms.
        tail = tl.exp(-tl.abs(x))
        near = 1.0 + tail
        over = tl.where(near == 1.0, 1.0, near - 1.0)
        log = tl.where(near == 1.0, tail, tl.log(near) * tail / over)
        score = tl.sqrt(tl.where(x > 0.0, x, 0.0) + log)
    return score


@triton.jit
def _select_experts_kernel(
    logits,
    bias,
    scores,
    ids,
    weights,
    zero_weights,
    logits_stride,
    num_experts,
    num_real,
    eps,
    least,
    scale,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    exists = expert < num_experts
    x = tl.load(logits + token * logits_stride + expert, mask=exists, other=-float("inf"))
    x = x.to(tl.float32)
    score = score_logits(x, exists, SCORE)
    if HAS_ZERO:
        tl.store(scores + token * num_real + expert, score, mask=expert < num_real)
    else:
        tl.store(scores + token * num_experts + expert, score, mask=exists)
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=exists, other=0.0)
    elif NUM_GROUPS == 1:
        # Logits have the order of their scores and stay apart where those round to one number.
        choice = x
    choice = tl.where(choice == choice, choice, float("inf"))  # NaN is the largest, as in torch
    left = exists

    if NUM_GROUPS > 1:
        group = expert // (num_experts // NUM_GROUPS)
        each_G = tl.arange(0, BLOCK_G)
        group_scores = tl.full([BLOCK_G], -float("inf"), tl.float32)
        for g in range(NUM_GROUPS):
            inside = exists & (group == g)
            best = tl.max(tl.where(inside, choice, -float("inf")), axis=0)
            if TOP2:
                winner = tl.min(tl.where(inside & (choice == best), expert, BLOCK_E), axis=0)
                inside &= expert != winner
                best += tl.max(tl.where(inside, choice, -float("inf")), axis=0)
            group_scores = tl.where(each_G == g, best, group_scores)
        allowed = expert < 0
        left_G = each_G < NUM_GROUPS
        for _ in range(TOP_GROUPS):
            best = tl.max(tl.where(left_G, group_scores, -float("inf")), axis=0)
            winner = tl.min(tl.where(left_G & (group_scores == best), each_G, BLOCK_G), axis=0)
            left_G &= each_G != winner
            allowed |= group == winner
        left &= allowed

    place = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_K], tl.int64)
    chosen_score = tl.zeros([BLOCK_K], tl.float32)
    for k in range(TOP_K):
        best = tl.max(tl.where(left, choice, -float("inf")), axis=0)
        # The lowest expert of the best: integers, so that no order of reduction matters.
        winner = tl.min(tl.where(left & (choice == best), expert, BLOCK_E), axis=0)
        is_winner = expert == winner
        won = tl.sum(tl.where(is_winner, score, 0.0), axis=0)
        chosen = tl.where(place == k, winner.to(tl.int64), chosen)
        chosen_score = tl.where(place == k, won, chosen_score)
        left &= ~is_winner
    weight = chosen_score
    if NORMALIZE:
        total = tl.sum(chosen_score, axis=0) + eps
        weight = weight / tl.where(total < least, least, total)
    weight = weight * scale
    if HAS_ZERO:
        is_zero = (chosen >= num_real) & (place < TOP_K)
        tl.store(zero_weights + token, tl.sum(tl.where(is_zero, weight, 0.0), axis=0))
        chosen = tl.where(is_zero, -1, chosen)
        weight = tl.where(is_zero, 0.0, weight)
    tl.store(ids + token * TOP_K + place, chosen, mask=place < TOP_K)
    tl.store(weights + token * TOP_K + place, weight, mask=place < TOP_K)


def select_experts_triton(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: SelectionRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton form of `select_experts`: same arguments and results."""
    scores_TE, topk_ids_TK, weights_TK, _ = select_with_zero_experts_triton(
        logits_TE, bias_E, rule, 0
    )
    return scores_TE, topk_ids_TK, weights_TK


def select_with_zero_experts_triton(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: SelectionRule, num_zero: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton form of `select_with_zero_experts`: same arguments and results; the last is the
    weights where there are no zero experts.
    """
    (num_tokens, num_experts), top_k = logits_TE.shape, rule.top_k
    num_real = num_experts - num_zero
    scores_TE = logits_TE.new_empty(num_tokens, num_real, dtype=torch.float32)
    topk_ids_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.float32)
    zero_T = weights_TK.new_empty(num_tokens) if num_zero else weights_TK
    if num_tokens == 0:
        return scores_TE, topk_ids_TK, weights_TK, zero_T
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    _select_experts_kernel[(num_tokens,)](
        logits_TE,
        logits_TE if bias_E is None else bias_E,
        scores_TE,
        topk_ids_TK,
        weights_TK,
        zero_T,
        logits_TE.stride(0),
        num_experts,
        num_real,
        rule.normalize_eps,
        rule.normalize_min,
        rule.scale,
        TOP_K=top_k,
        SCORE=rule.score,
        HAS_BIAS=bias_E is not None,
        HAS_ZERO=num_zero > 0,
        NORMALIZE=rule.normalize,
        NUM_GROUPS=rule.num_groups,
        TOP_GROUPS=rule.top_groups,
        # A group of one expert has no second one.
        TOP2=rule.group_score == "top2" and num_experts > rule.num_groups,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        BLOCK_G=triton.next_power_of_2(rule.num_groups),
    )
    return scores_TE, topk_ids_TK, weights_TK, zero_T


def variants() -> Iterator[Variant]:
    """Yield the calls to compile; scores are float32 in every model."""

    def variant(name: str, experts: int, rule: SelectionRule, *, bias: bool = False) -> Variant:
        def call(tokens: int) -> None:
            bias_E = meta(experts, dtype=torch.float32) if bias else None
            select_experts_triton(meta(tokens, experts, dtype=torch.float32), bias_E, rule)

        return Variant(name, call)

    for experts, top_k in ((8, 2), (60, 4), (128, 8)):
        rule = SelectionRule(top_k, "softmax", normalize=True)
        yield variant(f"fp32 softmax, {experts} experts", experts, rule)
    sigmoid = SelectionRule(8, "sigmoid", normalize=True, normalize_eps=1e-20, scale=2.5)
    yield variant("fp32 sigmoid, 256 experts", 256, sigmoid, bias=True)
    softplus = SelectionRule(6, "sqrt_softplus", normalize=True, normalize_eps=1e-20, scale=1.5)
    yield variant("fp32 sqrt_softplus, 256 experts", 256, softplus, bias=True)
    least = SelectionRule(6, "softmax", normalize=True, normalize_min=1e-12)
    yield variant("fp32 softmax with a bias, 64 experts", 64, least, bias=True)

    def with_zero_experts(tokens: int) -> None:
        logits_TE, bias_E = (meta(*each, 768, dtype=torch.float32) for each in ((tokens,), ()))
        select_with_zero_experts_triton(logits_TE, bias_E, SelectionRule(12, scale=6.0), 256)

    yield Variant("fp32 softmax with a bias, 512 experts and 256 zero experts", with_zero_experts)
