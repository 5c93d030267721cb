"""The gate on the output of a shared expert: rows times the sigmoid of a projection of the input.

Legend: T tokens, D model dim.
"""

import torch

from engine.ops import triton_support
from engine.ops.linear import linear


def gate_output(out_TD: torch.Tensor, x_TD: torch.Tensor, gate_1D: torch.Tensor) -> torch.Tensor:
    """Returns out_TD * sigmoid(x_TD @ gate_1D^T): [T, D] in out's dtype, each row by one number."""
    if triton_support.serves(out_TD):
        from engine.ops.gpu.gate_output import gate_output_triton

        return gate_output_triton(out_TD, x_TD, gate_1D)
    return gate_output_reference(out_TD, x_TD, gate_1D)


def gate_output_reference(
    out_TD: torch.Tensor, x_TD: torch.Tensor, gate_1D: torch.Tensor
) -> torch.Tensor:
    """`gate_output` as single ops, on CPU with the compiled projection where there is one."""
    return out_TD * linear(x_TD, gate_1D).sigmoid()
