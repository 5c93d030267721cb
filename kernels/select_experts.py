"""The choice of experts: from gate logits to scores, top-k and combine weights, in one pass.

Legend: T tokens, E experts, K top-k, X columns of scores.
"""

from typing import Literal, NamedTuple

import torch

from engine.ops import native, triton_support

Score = Literal["softmax", "sigmoid"]


class SelectionRule(NamedTuple):
    """How logits become a choice and weights. normalize: divide a token's weights by the sum of its
    top_k scores plus normalize_eps; scale multiplies them after that.
    """

    top_k: int
    score: Score = "softmax"
    normalize: bool = False
    normalize_eps: float = 0.0
    scale: float = 1.0


def select_experts(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: SelectionRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores float32 gate logits [T, E] and chooses each token's top_k experts; no host sync.

    bias_E: float32, added for the choice and never to the weights. Returns scores_TE (float32),
    topk_ids_TK (int64, best first) and topk_weights_TK (float32, see `weigh_scores`). Of equal
    scores the lower expert comes first, but where torch serves, which promises no order. NaN counts
    as the largest: the ids of a token are different experts that exist, whatever its logits.
    """
    given = (logits_TE,) if bias_E is None else (logits_TE, bias_E)
    if native.serves(*given):
        return torch.ops.lockstep_cpu.select_experts(
            logits_TE,
            bias_E,
            rule.top_k,
            rule.score == "softmax",
            rule.normalize,
            rule.normalize_eps,
            rule.scale,
        )
    if triton_support.serves(logits_TE):
        from engine.ops.gpu.select_experts import select_experts_triton

        return select_experts_triton(logits_TE, bias_E, rule)
    return select_experts_reference(logits_TE, bias_E, rule)


def select_experts_reference(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: SelectionRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain torch form of `select_experts`."""
    scores_TE = score_logits(logits_TE, rule.score)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    topk_ids_TK, weights_TK = choose(scores_TE, choice_TE, rule)
    return scores_TE, topk_ids_TK, weights_TK


def choose(
    scores_TE: torch.Tensor, choice_TE: torch.Tensor, rule: SelectionRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the top_k experts by choice_TE, best first, and their weights by scores_TE."""
    topk_ids_TK = choice_TE.topk(rule.top_k, dim=-1).indices
    topk_TK = scores_TE.gather(1, topk_ids_TK)
    return topk_ids_TK, weigh_scores(topk_TK, topk_TK, rule)


def score_logits(logits_TE: torch.Tensor, score: Score) -> torch.Tensor:
    """Returns the scores of float32 gate logits, [T, E]."""
    return logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()


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
