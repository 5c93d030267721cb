"""Hooks: what is put around and in the place of transformers' modules, beside layers of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from engine.models.transformers_model.routed_experts import RunningStep
from engine.profiling.phase_clock import Phase
from engine.profiling.telemetry import Telemetry


class Measured(Protocol):
    """A model whose phases are measured."""

    telemetry: Telemetry
    running: RunningStep


def enters(model: Measured, phase: Phase, layer: int) -> Callable[..., None]:
    """Return a hook that enters a phase of the clock, with the tokens of the running step."""

    def enter(*_: Any) -> None:
        step = model.running.step
        num_tokens = 0 if step is None else step.token_ids_T.shape[0]
        if phase is Phase.OTHER:
            model.telemetry.clock.enter(phase, layer)
        else:
            model.telemetry.clock.enter(phase, layer, num_tokens)

    return enter


class Given(nn.Module):
    """In place of a body whose final hidden states are known."""

    def forward(self, inputs_embeds: torch.Tensor, **_: Any) -> Any:
        """Return them in the form of transformers' outputs."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)  # type: ignore[arg-type]
