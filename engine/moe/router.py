"""Router: gate logits to scores, top-k experts and combine weights; step 2 of `layer.py`.

Pure functions on tensors; no collective, no host sync. Every family's routing is one `RouterSpec`:

| family      | score   | normalize | scale                 | groups                    | bias |
|-------------|---------|-----------|-----------------------|---------------------------|------|
| Mixtral     | softmax | yes       | 1                     | no                        | no   |
| OLMoE       | softmax | config    | 1                     | no                        | no   |
| Qwen2/3-MoE | softmax | config    | 1                     | no                        | no   |
| DeepSeek-V2 | softmax | no        | routed_scaling_factor | max of a group            | no   |
| DeepSeek-V3 | sigmoid | config    | routed_scaling_factor | sum of a group's best two | yes  |
| GLM-4.5     | sigmoid | config    | routed_scaling_factor | sum of a group's best two | yes  |
| MiniMax-M2  | sigmoid | yes       | 1                     | no                        | yes  |
| ERNIE-4.5   | softmax | yes, min  | 1                     | no                        | yes  |
| gpt-oss     | softmax | yes       | 1                     | no                        | no   |
| Llama 4     | sigmoid | no        | 1                     | no                        | no   |
| LongCat     | softmax | no        | routed_scaling_factor | no                        | yes  |

Experts are chosen by logits, whose order is that of their scores; with a bias by score + bias, and
in groups by score.

gpt-oss adds a bias to its logits, and takes the softmax of a token's chosen logits: that is the
softmax of all, normalised over the chosen. The weights here are before the scales of single experts
(`expert_scale`), by which `layer_agreement.py` multiplies what capacity has left of them.

DeepSeek-V4's first layers choose experts by a table of token ids (`token_table`). Scores exist for
all experts there too, and weights follow from those of the chosen, as in its other layers.

A *zero expert* (LongCat-Flash, arXiv 2509.01322) computes nothing: its output is the
token itself. The router chooses among E experts and Z zero experts; what it gives to the latter
becomes one weight per token here, and their assignments become the id -1, no expert, so that no
later step sees them.

Legend: T tokens on this rank, D model dim, E experts, Z zero experts, K top-k, V
token ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from engine.ops.linear import linear
from engine.ops.select_experts import Score, SelectionRule, select_experts, weigh_scores
from engine.ops.sigmoid import soft_cap_by_row
from engine.ops.table_experts import table_experts
from engine.ops.zero_experts import select_with_zero_experts


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How one family turns gate logits into experts and weights."""

    num_experts: int  # E
    top_k: int  # K
    score: Score = "softmax"
    normalize: bool = False  # divide a token's top-k scores by their sum + normalize_eps
    normalize_eps: float = 0.0
    normalize_min: float = 0.0  # that sum is at least this (ERNIE-4.5)
    scale: float = 1.0  # of the combine weights, after `normalize` (routed_scaling_factor)
    num_groups: int = 1
    top_groups: int = 1  # only experts of that many best groups may be chosen
    group_score: Literal["max", "top2"] = "max"
    # added to scores for the choice, never to weights (DeepSeek-V3, arXiv 2412.19437, 2.1.2)
    correction_bias: bool = False
    float32_logits: bool = False
    logit_bias: bool = False  # the gate has a bias, which the logits include
    logit_cap: float | None = None  # logits, float32 then, become cap * tanh(logits / cap)
    expert_scale: bool = False  # each expert's combine weight is multiplied by a number of its own
    weights_on_input: bool = False  # they multiply the experts' input, not their output (Llama 4)
    token_table: int | None = None  # rows of a table that gives each token id its experts, whatever
    # their scores (DeepSeek-V4); None: the best are chosen
    # What chooses experts and their weights in this engine's place (`MoELayer.steps`), in words:
    # no gate is held here. None: this engine's gate does.
    external: str | None = None
    # False, of an external router: scores are the combine weights of the chosen experts, 0 of the
    # others, and the rule above is not known.
    scores_known: bool = True
    num_zero_experts: int = 0  # Z, numbered behind the experts; each returns the token itself

    def __post_init__(self) -> None:
        """Check the fields against each other.

        Raises:
            ValueError: naming the field, its value and the rule.
        """
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok: {self.top_k} must be between 1 and the number of experts "
                f"({self.num_experts}); check the checkpoint's config.json"
            )
        if self.weights_on_input and self.top_k != 1:
            raise ValueError(
                f"num_experts_per_tok: {self.top_k} is not supported, only 1, where combine "
                "weights multiply the experts' input: a row is sent once for all experts of a rank"
            )
        if self.num_zero_experts < 0:
            raise ValueError(
                f"zero_expert_num: {self.num_zero_experts} must not be negative; check the "
                "checkpoint's config.json"
            )
        if self.num_zero_experts:
            self._check_zero_experts()
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
        if self.logit_cap is not None and not 0.0 < self.logit_cap < math.inf:
            raise ValueError(
                f"router_logit_softcapping: {self.logit_cap} must be a positive number; check the "
                "checkpoint's config.json"
            )
        if self.token_table is not None and (
            self.correction_bias or self.num_groups > 1 or self.num_zero_experts
        ):
            raise ValueError(
                "a layer whose experts come from a table of token ids chooses nothing by scores: "
                "it has no correction bias, no groups of experts "
                f"(n_group: {self.num_groups}) and no zero experts "
                f"(zero_expert_num: {self.num_zero_experts}); check the checkpoint's config.json"
            )
        reachable = self.top_groups * (self.num_experts // self.num_groups)
        if self.top_k > reachable:
            raise ValueError(
                f"num_experts_per_tok: {self.top_k} exceeds the {reachable} experts of topk_group="
                f"{self.top_groups} groups; check the checkpoint's config.json"
            )

    def _check_zero_experts(self) -> None:
        for is_set, name, why in (
            (self.num_groups > 1, "n_group", "are in none of the groups"),
            (self.weights_on_input, "weights on the experts' input", "have no input of their own"),
            (self.expert_scale, "a scale per expert", "have none"),
        ):
            if is_set:
                raise ValueError(
                    f"zero_expert_num: {self.num_zero_experts} is not supported with {name}: zero "
                    f"experts {why}"
                )

    @property
    def num_logits(self) -> int:
        """Experts and zero experts, between which the router chooses."""
        return self.num_experts + self.num_zero_experts

    @property
    def rule(self) -> SelectionRule:
        """The rule by which experts are chosen."""
        return SelectionRule(
            self.top_k,
            self.score,
            self.normalize,
            self.normalize_eps,
            self.scale,
            self.num_groups,
            self.top_groups,
            self.group_score,
            self.normalize_min,
        )


@dataclass(frozen=True, slots=True)
class Routing:
    """The router's result for this rank's tokens."""

    scores_TE: torch.Tensor  # float32, before any top-k normalisation (S_te in the paper)
    # int64, the chosen experts, best first or in the table's order; -1 for a zero expert
    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor  # float32, the combine weights, 0 where the id is -1
    zero_weight_T: torch.Tensor | None = None  # float32, of all chosen zero experts; None: no such


def gate_logits(
    x_TD: torch.Tensor,
    gate_weight_ED: torch.Tensor,
    spec: RouterSpec,
    logit_bias_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return gate logits [T, E + Z], in float32 where the family does so, else in the dtype of x.

    logit_bias_E: the gate's bias in the dtype of its weights, if and only if the spec has one.
    """
    logits_TE = _gate(x_TD, gate_weight_ED, spec, logit_bias_E)
    return logits_TE if spec.logit_cap is None else soft_cap_by_row(logits_TE, spec.logit_cap)


def _gate(
    x_TD: torch.Tensor,
    gate_weight_ED: torch.Tensor,
    spec: RouterSpec,
    logit_bias_E: torch.Tensor | None,
) -> torch.Tensor:
    """Return what the gate's weights and bias give, [T, E]."""
    assert (logit_bias_E is not None) == spec.logit_bias, "logit bias and spec disagree"
    if spec.float32_logits and x_TD.dtype != torch.float32:
        bias_E = None if logit_bias_E is None else logit_bias_E.float()
        return linear(x_TD.float(), gate_weight_ED.float(), bias_E)
    return linear(x_TD, gate_weight_ED, logit_bias_E)


def route(logits_TE: torch.Tensor, spec: RouterSpec, bias_E: torch.Tensor | None = None) -> Routing:
    """Return scores, chosen experts and combine weights of gate logits [T, E + Z].

    bias_E: float32, the correction bias, if and only if the spec has one.
    """
    assert (bias_E is not None) == spec.correction_bias, "correction bias and spec disagree"
    if spec.num_zero_experts:
        zero = spec.num_zero_experts
        return Routing(*select_with_zero_experts(logits_TE, bias_E, spec.rule, zero))
    return Routing(*select_experts(logits_TE, bias_E, spec.rule))


def route_by_table(
    logits_TE: torch.Tensor, spec: RouterSpec, table_VK: torch.Tensor, token_ids_T: torch.Tensor
) -> Routing:
    """Return scores of gate logits [T, E], and the experts that a table gives the tokens' ids.

    Args:
        logits_TE: gate logits.
        spec: with a token_table.
        table_VK: int64, different experts in every row.
        token_ids_T: int64, rows of the table.
    """
    assert spec.token_table is not None, "token table and spec disagree"
    return Routing(*table_experts(logits_TE, table_VK, token_ids_T, spec.rule))


def score_weights(
    scores_TX: torch.Tensor, topk_scores_TK: torch.Tensor, spec: RouterSpec
) -> torch.Tensor:
    """Return the family's weights for any scores of tokens, float32 [T, X].

    scores_TX, topk_scores_TK: float32; the latter are the tokens' original top-k scores.
    """
    return weigh_scores(scores_TX, topk_scores_TK, spec.rule)
