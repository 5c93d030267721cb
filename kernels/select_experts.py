"""The choice of experts: from gate logits to scores, top-k and combine weights, in one pass.

Legend: T tokens, E experts, K top-k, X columns of scores.
"""

from typing import Literal, NamedTuple

import torch

from engine.ops import native, triton_support

Score = Literal["softmax", "sigmoid"]


class SelectionRule(NamedTuple):
    """How logits become a choice and weights. normalize: divide a token's weights by the sum of its
    top_k scores plus normalize_eps; scale multiplies them after that. Only experts of a token's
    top_groups best of num_groups equal groups may be chosen; a group's score is its largest one,
    or the sum of its two largest (top2).
    """

    top_k: int
    score: Score = "softmax"
    normalize: bool = False
    normalize_eps: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"


def select_experts(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: SelectionRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores gate logits [T, E] in float32 and chooses each token's top_k experts; no host sync.

    bias_E: float32, added for the choice and never to the weights. Returns scores_TE (float32),
    topk_ids_TK (int64, best first) and topk_weights_TK (float32, see `weigh_scores`). Of equal
    scores the lower expert comes first, but where torch serves, which promises no order. NaN counts
    as the largest: the ids of a token are different experts that exist, whatever its logits.
    """
    if triton_support.serves(logits_TE):
        from engine.ops.gpu.select_experts import select_experts_triton

        return select_experts_triton(logits_TE, bias_E, rule)
    logits_TE = logits_TE.float()
    given = (logits_TE,) if bias_E is None else (logits_TE, bias_E)
    if rule.num_groups == 1 and native.serves(*given):
        return torch.ops.lockstep_cpu.select_experts(
            logits_TE,
            bias_E,
            rule.top_k,
            rule.score == "softmax",
            rule.normalize,
            rule.normalize_eps,
            rule.scale,
        )
    return select_experts_reference(logits_TE, bias_E, rule)


def select_experts_reference(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: SelectionRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain torch form of `select_experts`."""
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(-1) if rule.score == "softmax" else logits_TE.sigmoid()
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if rule.num_groups > 1:
        choice_TE = _mask_groups(choice_TE, rule)
    topk_ids_TK = choice_TE.topk(rule.top_k, dim=-1).indices
    topk_TK = scores_TE.gather(1, topk_ids_TK)
    return scores_TE, topk_ids_TK, weigh_scores(topk_TK, topk_TK, rule)


def _mask_groups(choice_TE: torch.Tensor, rule: SelectionRule) -> torch.Tensor:
    """Returns the scores with experts outside each token's best groups set to -inf (DeepSeek-V2,
    arXiv 2405.04434, section 2.1.2).
    """
    grouped = choice_TE.unflatten(1, (rule.num_groups, -1))  # [T, groups, experts per group]
    if rule.group_score == "max":
        group_scores = grouped.amax(-1)
    else:
        group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    best = group_scores.topk(rule.top_groups, dim=-1).indices
    keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(1)


def weigh_scores(
    scores_TX: torch.Tensor, topk_scores_TK: torch.Tensor, rule: SelectionRule
) -> torch.Tensor:
    """Returns the combine weights, float32 [T, X], of any scores of tokens whose original top-k
    scores are known.
    """
    weights_TX = scores_TX
    if rule.normalize:
        weights_TX = weights_TX / (topk_scores_TK.sum(-1, keepdim=True) + rule.normalize_eps)
    return weights_TX if rule.scale == 1.0 else weights_TX * rule.scale
