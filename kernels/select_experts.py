"""The choice of experts: from gate logits to scores, top-k and combine weights, in one pass; and
what a capacity policy leaves of it.

Legend: T tokens, E experts, e experts on this rank, K top-k, X columns of scores, M columns of the
result (K or K + e).
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from engine.ops import native, triton_support
from engine.ops.sigmoid import sigmoid_by_row

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]
SCORES: tuple[Score, ...] = ("softmax", "sigmoid", "sqrt_softplus")  # by the compiled ops' numbers


class SelectionRule(NamedTuple):
    """How logits become a choice and weights. normalize: divide a token's weights by the sum of its
    top_k scores plus normalize_eps, which normalize_min raises where it is less; scale multiplies
    them after that. Only experts of a token's top_groups best of num_groups equal groups may be
    chosen; a group's score is its largest one, or the sum of its two largest (top2).
    """

    top_k: int
    score: Score = "softmax"
    normalize: bool = False
    normalize_eps: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    normalize_min: float = 0.0


def select_experts(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: SelectionRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores gate logits [T, E] in float32 and chooses each token's top_k experts; no host sync.

    The choice is by logits, whose order is that of their scores and which stay apart where scores
    round to the same number; with a bias or groups it is by scores. bias_E: float32, added for the
    choice and never to the weights. Returns scores_TE (float32), topk_ids_TK (int64, best first)
    and topk_weights_TK (float32, see `weigh_scores`). Of equal ones the lower expert comes first,
    but where torch serves, which promises no order. NaN counts as the largest: the ids of a token
    are different experts that exist, whatever its logits.
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
            SCORES.index(rule.score),
            rule.normalize,
            rule.normalize_eps,
            rule.normalize_min,
            rule.scale,
        )
    return select_experts_reference(logits_TE, bias_E, rule)


def select_experts_reference(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, rule: SelectionRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain torch form of `select_experts`."""
    logits_TE = logits_TE.float()
    scores_TE = _score(logits_TE, rule.score)
    choice_TE = logits_TE if bias_E is None else scores_TE + bias_E
    if rule.num_groups > 1:
        choice_TE = _mask_groups(scores_TE if bias_E is None else choice_TE, rule)
    topk_ids_TK = choice_TE.topk(rule.top_k, dim=-1).indices
    topk_TK = scores_TE.gather(1, topk_ids_TK)
    return scores_TE, topk_ids_TK, weigh_scores(topk_TK, topk_TK, rule)


def score_logits(logits_TE: torch.Tensor, score: Score) -> torch.Tensor:
    """Return the scores that `select_experts` gives gate logits, the same bits, float32 [T, E]."""
    return select_experts(logits_TE, None, SelectionRule(1, score))[0]


def _score(logits_TE: torch.Tensor, score: Score) -> torch.Tensor:
    if score == "softmax":
        return logits_TE.softmax(-1)
    return sigmoid_by_row(logits_TE) if score == "sigmoid" else F.softplus(logits_TE).sqrt()


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
        sum_T1 = topk_scores_TK.sum(-1, keepdim=True) + rule.normalize_eps
        if rule.normalize_min > 0.0:
            sum_T1 = sum_T1.clamp(min=rule.normalize_min)
        weights_TX = weights_TX / sum_T1
    return weights_TX if rule.scale == 1.0 else weights_TX * rule.scale


def apply_selection(
    keep_TK: torch.Tensor,
    scores_TE: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    rule: SelectionRule,
    first_expert: int,
    renormalize: bool,
    extra_Te: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is computed: ids, int64 [T, M], the top-k kept, then extras in the order of the
    local experts, -1 for none; and their combine weights, float32 [T, M], 0 for none.

    Args:
        keep_TK: bool.
        scores_TE: float32; read for extras alone.
        topk_ids_TK: int64, -1 for none; where the rule normalises, extras need all of them.
        topk_weights_TK: float32.
        rule: the router's.
        first_expert: the first of this rank's experts.
        renormalize: scale the weights of a token that has changed to their former sum.
        extra_Te: bool; None: without extras.
    """
    given = (keep_TK, scores_TE, topk_ids_TK, topk_weights_TK, rule, first_expert, renormalize)
    if triton_support.serves(keep_TK):
        from engine.ops.gpu.apply_selection import apply_selection_triton

        return apply_selection_triton(*given, extra_Te)
    return apply_selection_reference(*given, extra_Te)


def apply_selection_reference(
    keep_TK: torch.Tensor,
    scores_TE: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    rule: SelectionRule,
    first_expert: int,
    renormalize: bool,
    extra_Te: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch form of `apply_selection`."""
    ids_TM = topk_ids_TK.where(keep_TK, -1)
    kept_TM = topk_weights_TK.where(keep_TK, 0.0)
    if extra_Te is not None:
        num_local = extra_Te.shape[1]
        local_e = torch.arange(num_local, device=keep_TK.device) + first_expert
        ids_TM = torch.cat((ids_TM, local_e.expand_as(extra_Te).where(extra_Te, -1)), dim=1)
        scores_Te = scores_TE[:, first_expert : first_expert + num_local]
        topk_TK = scores_TE.gather(1, topk_ids_TK) if rule.normalize else scores_Te
        weights_Te = weigh_scores(scores_Te, topk_TK, rule)
        kept_TM = torch.cat((kept_TM, weights_Te.where(extra_Te, 0.0)), dim=1)
    if not renormalize:
        return ids_TM, kept_TM
    changed_T1 = (~keep_TK).any(1, keepdim=True)
    if extra_Te is not None:
        changed_T1 = changed_T1 | extra_Te.any(1, keepdim=True)
    kept_T1 = kept_TM.sum(1, keepdim=True)
    changed_T1 = changed_T1 & (kept_T1 > 0)
    # Divide first: the old sum over a tiny new one would overflow.
    rescaled_TM = kept_TM / kept_T1 * topk_weights_TK.sum(1, keepdim=True)
    return ids_TM, rescaled_TM.where(changed_T1, kept_TM)
