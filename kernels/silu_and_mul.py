"""silu(gate) * up, the activation between the two matrices of a gated FFN.

Legend: R rows, F hidden dim of the FFN.
"""

import torch
import torch.nn.functional as F

from engine.ops import native, triton_support


def silu_and_mul(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """Returns silu(first half) * second half of the last dim: [R, 2F] -> [R, F], same dtype."""
    if native.serves(gate_up_R2F):
        return torch.ops.lockstep_cpu.silu_and_mul(gate_up_R2F)
    if triton_support.serves(gate_up_R2F):
        from engine.ops.gpu.silu_and_mul import silu_and_mul_triton

        return silu_and_mul_triton(gate_up_R2F)
    return silu_and_mul_reference(gate_up_R2F)


def silu_and_mul_reference(gate_up_R2F: torch.Tensor) -> torch.Tensor:
    """Plain torch form of `silu_and_mul`."""
    gate_RF, up_RF = gate_up_R2F.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF
