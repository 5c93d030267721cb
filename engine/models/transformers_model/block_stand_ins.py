"""Block stand-ins: modules and numbers with which an MoE block of transformers is run alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Reached(Exception):
    """The experts are called."""

    def __init__(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.ids, self.weights = ids, weights


class EndsRun(nn.Module):
    """In place of experts: ends the block's run."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Raise `Reached` with the arguments."""
        raise Reached(top_k_index, top_k_weights)


class Returns(nn.Module):
    """In place of a module that has nothing to do with routing: returns zeros."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return zeros in the form of the recorded output."""
        return _zeros(self._output)


def random_numbers(
    given: Any,
    random: torch.Generator,
    common: Mapping[int, torch.Tensor],
    call: tuple[float, float],
) -> Any:
    """Return random numbers for a tensor of a recorded call, all else as it is."""
    if isinstance(given, (tuple, list)):
        return type(given)(random_numbers(each, random, common, call) for each in given)
    if not isinstance(given, torch.Tensor):
        return given
    if not given.is_floating_point():
        return torch.zeros(given.shape, dtype=given.dtype)
    (shift, spread), numbers = call, torch.randn(given.shape, generator=random)
    if (direction := common.get(given.shape[-1] if given.dim() else 0)) is not None:
        numbers -= (numbers @ direction)[..., None] * direction
        numbers = spread * numbers + shift * direction
    return numbers


def _zeros(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return torch.zeros(output.shape, dtype=output.dtype)
    if isinstance(output, (tuple, list)):
        return type(output)(_zeros(each) for each in output)
    return output
