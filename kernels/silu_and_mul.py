"""The gates of an FFN: silu(gate) * up between its two matrices, and one on its output.

Legend: R rows, F hidden dim of the FFN, T tokens, D model dim.
"""

import torch
import torch.nn.functional as F

from engine.ops import native, triton_support
from engine.ops.linear import linear
from engine.ops.sigmoid import sigmoid_by_row


def silu_and_mul(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """Returns silu(first half) * second half of the last dim: [R, 2F] -> [R, F], same dtype."""
    if native.serves(gate_up_R2F):
        return torch.ops.lockstep_cpu.silu_and_mul(gate_up_R2F)
    if triton_support.serves(gate_up_R2F):
        from engine.ops.gpu.silu_and_mul import silu_and_mul_triton

        return silu_and_mul_triton(gate_up_R2F)
    return silu_and_mul_reference(gate_up_R2F)


def gate_output(out_TD: torch.Tensor, x_TD: torch.Tensor, gate_1D: torch.Tensor) -> torch.Tensor:
    """Returns out_TD * sigmoid(x_TD @ gate_1D^T): [T, D] in out's dtype, each row by one number."""
    if triton_support.serves(out_TD):
        from engine.ops.gpu.gate_output import gate_output_triton

        return gate_output_triton(out_TD, x_TD, gate_1D)
    return gate_output_reference(out_TD, x_TD, gate_1D)


def silu_and_mul_reference(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """Plain torch form of `silu_and_mul`."""
    gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF


def gate_output_reference(
    out_TD: torch.Tensor, x_TD: torch.Tensor, gate_1D: torch.Tensor
) -> torch.Tensor:
    """`gate_output` as single ops, on CPU with the compiled projection where there is one."""
    return out_TD * sigmoid_by_row(linear(x_TD, gate_1D))
