"""Root-mean-square normalisation of heads, each number gated by silu of another projection.

Legend: T tokens, R rows, H heads, V dim of a head, O = H * V.
"""

import torch
import torch.nn.functional as F

from engine.ops import triton_support
from engine.ops.rms_norm import rms_norm


def gated_rms_norm(
    x_THV: torch.Tensor,
    gate_TO: torch.Tensor,
    weight_V: torch.Tensor,
    eps: float,
    rows_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns rms_norm of each head times silu(gate): [R, O] in x's dtype.

    The mean and silu are taken in float32. rows_R (int64): the tokens whose result is needed, in
    this order; None: all.
    """
    if triton_support.serves(x_THV):
        from engine.ops.gpu.gated_rms_norm import gated_rms_norm_triton

        return gated_rms_norm_triton(x_THV, gate_TO, weight_V, eps, rows_R)
    return gated_rms_norm_reference(x_THV, gate_TO, weight_V, eps, rows_R)


def gated_rms_norm_reference(
    x_THV: torch.Tensor,
    gate_TO: torch.Tensor,
    weight_V: torch.Tensor,
    eps: float,
    rows_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """`gated_rms_norm` as single ops, on CPU with the compiled norm where there is one."""
    if rows_R is not None:
        x_THV, gate_TO = x_THV.index_select(0, rows_R), gate_TO.index_select(0, rows_R)
    normed_RO = rms_norm(x_THV.contiguous(), weight_V, eps).flatten(1)
    return (normed_RO * F.silu(gate_TO.float())).to(x_THV.dtype)
