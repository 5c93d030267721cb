"""Routed experts: this engine's MoE layer in the place of transformers' experts module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.layers.kv_cache import KVCache
from engine.layers.step_inputs import StepTensors
from engine.models.transformers_model.router_scores import RouterScores
from engine.moe.dispatch.two_batch import run_to_end
from engine.moe.layer import MoELayer
from engine.moe.router import Routing
from engine.moe.step import MoEStep
from engine.ops.select_experts import score_logits


@dataclass(slots=True)
class RunningStep:
    """What the layers of a model need of the step that runs, beside its hidden states."""

    step: StepTensors | None = None
    kv: KVCache | None = None
    moe_step: MoEStep | None = None
    group_tokens: int | None = None
    uses_copies: bool = True
    bucket: int | None = None


class RoutedExperts(nn.Module):
    """Runs a token's experts on the ranks that have them.

    The model's own router chooses. The scores by which capacity decides are those of its logits
    where they are known, else its combine weights.

    Args:
        moe: the layer, with an external router.
        running: shared by the layers of a model.
        scores: where the logits are; None: not known.
    """

    def __init__(self, moe: MoELayer, running: RunningStep, scores: RouterScores | None) -> None:
        super().__init__()
        self.moe = moe
        self._running, self._scores = running, scores
        self._logits_TE: torch.Tensor | None = None  # of the tokens whose experts run next

    def take_logits(self, _: nn.Module, __: Any, output: Any) -> None:
        """Keep the logits in a module's output, as its forward hook."""
        assert self._scores is not None
        logits = output if self._scores.index is None else output[self._scores.index]
        self._logits_TE = logits.reshape(-1, logits.shape[-1]).contiguous()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of each token's experts by weight, [T, D].

        Args:
            hidden_states: [T, D]; T may be 0.
            top_k_index: int64 [T, K], experts.
            top_k_weights: [T, K], combine weights.

        Collective over EP: every rank must call.
        """
        running, weights_TK = self._running, top_k_weights.float()
        router = self.moe.spec.router
        if self._scores is not None:
            assert self._logits_TE is not None, "the router did not run"
            scores_TE = score_logits(self._logits_TE, router.score)
            self._logits_TE = None
        else:
            scores_TE = weights_TK.new_zeros(hidden_states.shape[0], router.num_experts)
            scores_TE.scatter_(1, top_k_index, weights_TK)
        return run_to_end(
            self.moe.steps(
                hidden_states,
                running.moe_step,
                running.group_tokens,
                uses_copies=running.uses_copies,
                routing=Routing(scores_TE, top_k_index, weights_TK),
                bucket=running.bucket,
            )
        )

    def run_empty(self, hidden_states: torch.Tensor) -> None:
        """Take part in the collectives of a step without tokens; hidden_states: [0, D].

        Collective over EP: every rank must call.
        """
        router = self.moe.spec.router
        ids_TK = hidden_states.new_zeros((0, router.top_k), dtype=torch.int64)
        self._logits_TE = hidden_states.new_zeros((0, router.num_experts))
        self(hidden_states, ids_TK, hidden_states.new_zeros(ids_TK.shape))
