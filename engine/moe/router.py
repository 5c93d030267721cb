"""Router: gate logits to scores, top-k experts and combine weights. The first step of `layer.py`.

Pure functions on tensors; no collective, no host sync. Every family's routing is one `RouterSpec`:

| family      | score   | normalize | scale                 | groups                    | bias |
|-------------|---------|-----------|-----------------------|---------------------------|------|
| Mixtral     | softmax | yes       | 1                     | no                        | no   |
| OLMoE       | softmax | config    | 1                     | no                        | no   |
| Qwen2/3-MoE | softmax | config    | 1                     | no                        | no   |
| DeepSeek-V2 | softmax | no        | routed_scaling_factor | max of a group            | no   |
| DeepSeek-V3 | sigmoid | config    | routed_scaling_factor | sum of a group's best two | yes  |

Legend: T tokens on this rank, D model dim, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from engine.ops.linear import linear
from engine.ops.select_experts import (
    SelectionRule,
    choose,
    score_logits,
    select_experts,
    weigh_scores,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How one family turns gate logits into experts and weights.

    `scale` multiplies the combine weights (DeepSeek's routed_scaling_factor). `normalize` divides a
    token's top-k scores by their sum plus `normalize_eps`, before `scale`. With `num_groups` > 1
    only the experts of the `top_groups` best groups may be chosen. `correction_bias` is added for
    the choice, never to the weights (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    normalize_eps: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    correction_bias: bool = False
    float32_logits: bool = False

    def __post_init__(self) -> None:
        """Refuse what no checkpoint can mean.

        Raises:
            ValueError: naming the field, its value and the rule.
        """
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok: {self.top_k} must be between 1 and the number of experts "
                f"({self.num_experts}); check the checkpoint's config.json"
            )
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"n_group: {self.num_groups} must divide the number of experts "
                f"({self.num_experts}); check the checkpoint's config.json"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"topk_group: {self.top_groups} must be between 1 and n_group "
                f"({self.num_groups}); check the checkpoint's config.json"
            )
        reachable = self.top_groups * (self.num_experts // self.num_groups)
        if self.top_k > reachable:
            raise ValueError(
                f"num_experts_per_tok: {self.top_k} exceeds the {reachable} experts of topk_group="
                f"{self.top_groups} groups; check the checkpoint's config.json"
            )

    @property
    def rule(self) -> SelectionRule:
        """What the choice among all experts needs to know of it."""
        return SelectionRule(self.top_k, self.score, self.normalize, self.normalize_eps, self.scale)


@dataclass(frozen=True, slots=True)
class Routing:
    """What the router decided for this rank's tokens.

    scores_TE: float32, the family's scores before any top-k normalisation (S_te of the capacity
    literature). topk_ids_TK: int64, the chosen experts, best first. topk_weights_TK: float32, the
    combine weights.
    """

    scores_TE: torch.Tensor
    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor


def gate_logits(x_TD: torch.Tensor, gate_weight_ED: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """Return gate logits [T, E], float32; the product runs in float32 where the family says so."""
    if spec.float32_logits and x_TD.dtype != torch.float32:
        return linear(x_TD.float(), gate_weight_ED.float())
    return linear(x_TD, gate_weight_ED).float()


def route(logits_TE: torch.Tensor, spec: RouterSpec, bias_E: torch.Tensor | None = None) -> Routing:
    """Turn float32 gate logits [T, E] into scores, chosen experts and combine weights.

    bias_E: float32 [E], the correction bias, required exactly when the spec says so.
    """
    assert (bias_E is not None) == spec.correction_bias, "correction bias and spec disagree"
    rule = spec.rule
    if spec.num_groups == 1:
        return Routing(*select_experts(logits_TE, bias_E, rule))
    scores_TE = score_logits(logits_TE, spec.score)
    choice_TE = _mask_groups(scores_TE if bias_E is None else scores_TE + bias_E, spec)
    return Routing(scores_TE, *choose(scores_TE, choice_TE, rule))


def combine_weights(topk_scores_TK: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """The family's combine weights for the original top-k scores, both float32 [T, K]."""
    return score_weights(topk_scores_TK, topk_scores_TK, spec)


def score_weights(
    scores_TX: torch.Tensor, topk_scores_TK: torch.Tensor, spec: RouterSpec
) -> torch.Tensor:
    """The weights the family gives to any scores of tokens whose original top-k scores are known.

    scores_TX, topk_scores_TK: float32. Returns float32 [T, X].
    """
    return weigh_scores(scores_TX, topk_scores_TK, spec.rule)


def _mask_groups(choice_TE: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """Set the experts outside each token's best groups to -inf (DeepSeek-V2, arXiv 2405.04434,
    2.1.2).
    """
    grouped = choice_TE.unflatten(1, (spec.num_groups, -1))  # [T, groups, experts a group]
    if spec.group_score == "max":
        group_scores = grouped.amax(-1)
    else:
        group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    best = group_scores.topk(spec.top_groups, dim=-1).indices
    keep = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    return grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(1)
