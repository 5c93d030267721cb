"""Sigmoid and soft-cap of a few numbers per token, whose bits do not depend on the other tokens.

Torch computes whole vectors and what is left over in two ways, whose last bits differ, so a token's
sigmoid or tanh would change with how many others run with it.

Legend: T tokens, E numbers per token.
"""

import torch

from engine.ops import native

_SIGMOID = 1  # its number among the scores of the compiled op, see `select_experts.py`


def sigmoid_by_row(x_TE: torch.Tensor) -> torch.Tensor:
    """Returns sigmoid(x_TE): [T, E] in x's dtype; with the compiled CPU kernels row by row."""
    if native.serves(x_TE) and x_TE.numel():
        # The router's kernel scores each row by itself; what it selects is not needed.
        return torch.ops.lockstep_cpu.select_experts(x_TE, None, 1, _SIGMOID, False, 0.0, 0.0, 1.0)[
            0
        ]
    return x_TE.sigmoid()


def soft_cap_by_row(x_TE: torch.Tensor, cap: float) -> torch.Tensor:
    """Returns cap * tanh(x_TE / cap): [T, E] float32, between -cap and cap, within cap * 5e-7 of
    the exact value; with the compiled CPU kernels row by row.
    """
    # tanh(x) = 2 sigmoid(2x) - 1
    return sigmoid_by_row(x_TE.float() * (2.0 / cap)).mul_(2.0 * cap).sub_(cap)
