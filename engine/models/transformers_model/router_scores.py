"""Router scores: which function of a router's logits its combine weights are.

Transformers' experts are called with the chosen experts and their combine weights. A capacity
policy needs the scores of all experts, and for extras their weights: both follow from the logits by
a rule that is written nowhere. So it is fitted: the weights that a router gives for random logits
(`block_record.py`) are compared with those of each of this engine's rules (`RouterSpec`). Where
none gives them, as for sparsemixer (Phi-3.5-MoE, arXiv 2409.12136), or where several do whose
scores differ, no scores are known.

How experts are chosen (correction bias, groups) is not asked: it stays the router's own.

Legend: N tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.ops.select_experts import SCORES, Score, SelectionRule, score_logits, weigh_scores

# What families add to the sum that they divide by, or have as its minimum; besides these, the
# numbers that a block's modules hold are tried.
_SMALL = (1e-20, 1e-12, 1e-9, 1e-8, 1e-6, 1e-5)
_CLOSE = 1e-4  # relative; another rule is much further away on some of the tokens
_DIGITS = 6  # significant, of a scale


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterScores:
    """Where the logits of one layer are, and the rule that makes weights of their scores."""

    name: str  # of the module whose output they are, in the block
    index: int | None  # in that output; None: it is the output
    score: Score
    normalize: bool
    normalize_eps: float
    normalize_min: float
    scale: float


def fit_rule(
    logits_NE: torch.Tensor,
    ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
    top_k: int,
    small: Sequence[float],
) -> SelectionRule | None:
    """Return the rule that gives the weights of logits for the chosen ids.

    None: no rule does, or rules of different scores do.

    Args:
        logits_NE: float32.
        ids_NK: int64.
        weights_NK: float32.
        top_k: K.
        small: further numbers that may be added to a sum, or be its minimum.
    """
    if int(ids_NK.min()) < 0 or int(ids_NK.max()) >= logits_NE.shape[1]:
        return None
    # Without a minimum, sums that are 0 in float32 have no weights.
    real_N = logits_NE.isfinite().all(1) & weights_NK.isfinite().all(1)
    given = logits_NE[real_N], ids_NK[real_N], weights_NK[real_N]
    found = [
        rule
        for score in SCORES
        if (rule := _fit_score(*given, SelectionRule(top_k, score), small)) is not None
    ]
    return found[0] if len(found) == 1 else None


def _fit_score(
    logits_NE: torch.Tensor,
    ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
    rule: SelectionRule,
    small: Sequence[float],
) -> SelectionRule | None:
    """Return a rule of this score that gives the weights; None: there is none."""
    topk_NK = score_logits(logits_NE, rule.score).gather(1, ids_NK)
    usual_N = topk_NK.sum(1) > 1e-2
    small = (*_SMALL, *small)
    changes = ((0.0, 0.0), *((eps, 0.0) for eps in small), *((0.0, least) for least in small))
    for normalize in (False, True):
        unscaled = rule._replace(normalize=normalize)
        ratio_NK = weights_NK[usual_N] / weigh_scores(topk_NK, topk_NK, unscaled)[usual_N]
        scale = float(f"{float(ratio_NK.nanmedian()):.{_DIGITS}g}")
        for eps, least in changes if normalize else changes[:1]:
            tried = unscaled._replace(normalize_eps=eps, normalize_min=least, scale=scale)
            found_NK = weigh_scores(topk_NK, topk_NK, tried)
            if torch.allclose(found_NK, weights_NK, rtol=_CLOSE, atol=1e-12):
                return tried
    return None
