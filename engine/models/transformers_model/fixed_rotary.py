"""Fixed rotary: rotary embeddings whose frequencies follow from a sequence's length, as tables.

With `longrope` and `dynamic` transformers chooses frequencies, and factors on cosines and sines, by
the last position of a call. A step here holds many sequences, and keys in the cache cannot be
rotated again, so the choice is made once: for `model.max_model_len` tokens, as for the families of
this engine (`engine/layers/rotary.py`). It is transformers' own for every sequence where
max_model_len is at most the length up to which the frequencies do not change.

Legend: P positions, T tokens of the step, R rotary dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_BY_LENGTH = ("dynamic", "longrope")


class FixedRotary(nn.Module):
    """In place of a rotary embedding: what it gives to a sequence of `max_len` tokens.

    Args:
        rotary: transformers' module, on any device; it is built again on the CPU to be run once.
        max_len: P.
        device, dtype: of the tables.
    """

    def __init__(
        self, rotary: nn.Module, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        module: Any = rotary
        made = type(module)(module.config)
        x, positions_1P = torch.empty(0, dtype=dtype), torch.arange(max_len)[None]
        kinds = made.rope_type if isinstance(made.rope_type, Mapping) else [None]
        self._tables: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = {}
        with torch.no_grad():
            for kind in kinds:
                cos, sin = made(x, positions_1P, *([] if kind is None else [kind]))
                self._tables[kind] = (cos[0].to(device), sin[0].to(device))

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines [1, T, R] of positions [1, T]; x: not read."""
        del x
        cos_PR, sin_PR = self._tables[layer_type]
        return cos_PR[position_ids], sin_PR[position_ids]


def fix_lengths(model: nn.Module, max_len: int, device: torch.device, dtype: torch.dtype) -> None:
    """Replace a model's rotary embeddings whose frequencies follow from the length, in place."""
    for path, module in list(model.named_modules()):
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values() if isinstance(kinds, Mapping) else [kinds])
        if kinds.intersection(_BY_LENGTH):
            parent, _, name = path.rpartition(".")
            fixed = FixedRotary(module, max_len, device, dtype)
            setattr(model.get_submodule(parent), name, fixed)
