"""Rotary position embedding: one table of cosines and sines per model, read once per step.

The table covers positions 0 .. max_len - 1; its rows of a step's tokens are the same for every
layer. The rotation itself is `engine.ops.rotary`. Frequencies and attention scaling of every
scaling type come from transformers, so a checkpoint has the same angles here and there.

Legend: T tokens, P positions, R rotated dims of a head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class RotaryTable(nn.Module):
    """Cosines and sines of every position below `max_len`, in the model's dtype.

    Args:
        hf_config: a transformers configuration, whose `rope_parameters` are read.
        rotary_dim: R.

    Scaling types that depend on the sequence length (dynamic, longrope) are resolved once for
    `max_len`, because keys in the cache cannot be rotated again: dynamic equals transformers up to
    max_position_embeddings, and longrope uses its long factors exactly when `max_len` exceeds the
    original context.

    Raises:
        ValueError: on a scaling type that this engine does not support.
    """

    table_PR: torch.Tensor

    def __init__(
        self,
        hf_config: Any,
        rotary_dim: int,
        max_len: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        inv_freq, scaling = rope_frequencies(hf_config, rotary_dim, max_len)
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq)
        # Each angle is stored once: R/2 cosines, then R/2 sines.
        table = torch.cat((angles.cos(), angles.sin()), dim=1) * scaling
        self.register_buffer("table_PR", table.to(device, dtype), persistent=False)

    def rows(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines [T, R] of int64 positions; each angle twice, as the op needs."""
        cos, sin = self.table_PR.index_select(0, positions_T).chunk(2, dim=1)
        return cos.repeat(1, 2), sin.repeat(1, 2)


def rope_frequencies(hf_config: Any, rotary_dim: int, max_len: int) -> tuple[torch.Tensor, float]:
    """Return the inverse frequencies, float32 [R / 2], and the factor on cosines and sines.

    Raises:
        ValueError: see `RotaryTable`.
    """
    parameters = hf_config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    # transformers reads the width from `head_dim`, which a configuration may carry as None.
    config = copy.copy(hf_config)
    config.head_dim = rotary_dim
    config.rope_parameters = parameters | {"partial_rotary_factor": 1.0}  # R has it already
    return _scaling_function(rope_type)(config, seq_len=max_len)


def yarn_softmax_factor(rope_parameters: dict[str, Any]) -> float:
    """Return DeepSeek's factor on the softmax scale, 1.0 without `mscale_all_dim`.

    (0.1 * mscale_all_dim * ln(factor) + 1) squared, once for the queries and once for the keys
    (YaRN, arXiv 2309.00071, section 3.4).
    """
    mscale = rope_parameters.get("mscale_all_dim") or 0.0
    factor = rope_parameters.get("factor") or 1.0
    if rope_parameters.get("rope_type", "default") == "default" or not mscale or factor <= 1.0:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2


def _scaling_function(rope_type: str) -> Callable[..., tuple[torch.Tensor, float]]:
    """Return transformers' function for a scaling type."""
    # Imported only for a scaled model: transformers takes long to import.
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = sorted(set(ROPE_INIT_FUNCTIONS) & {"linear", "dynamic", "yarn", "llama3", "longrope"})
    if rope_type not in known:
        raise ValueError(
            f"rope_type: {rope_type!r} in config.json is not supported; use a checkpoint with one "
            f"of: default, {', '.join(known)}"
        )
    return ROPE_INIT_FUNCTIONS[rope_type]
