"""Root-mean-square normalisation, alone and with the residual addition before it.

Legend: T tokens, D normalised dim. Source: Zhang and Sennrich, Root Mean Square Layer
Normalization, 2019.
"""

import torch

from engine.ops import native, triton_support


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * weight over the last dim, in x's dtype and shape.

    The mean is taken in float32 whatever the dtype. Any number of leading dims.
    """
    if native.serves(x_TD, weight_D):
        return torch.ops.lockstep_cpu.rms_norm(x_TD, weight_D, eps)
    if triton_support.serves(x_TD):
        from engine.ops.gpu.rms_norm import rms_norm_triton

        return rms_norm_triton(x_TD, weight_D, eps)
    return rms_norm_reference(x_TD, weight_D, eps)


def add_rms_norm(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """Adds x to the residual IN PLACE and returns rms_norm of the sum, a new tensor in x's dtype.

    residual_TD is contiguous and has x's shape; it must not share memory with x.
    """
    if native.serves(x_TD, residual_TD, weight_D):
        return torch.ops.lockstep_cpu.add_rms_norm(x_TD, residual_TD, weight_D, eps)
    if triton_support.serves(x_TD):
        from engine.ops.gpu.rms_norm import rms_norm_triton

        return rms_norm_triton(x_TD, weight_D, eps, residual_TD)
    return add_rms_norm_reference(x_TD, residual_TD, weight_D, eps)


def rms_norm_reference(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Plain torch form of `rms_norm`; the weight multiplies after the cast back to x's dtype."""
    wide_TD = x_TD.float()
    scale_T1 = torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return (wide_TD * scale_T1).to(x_TD.dtype) * weight_D


def add_rms_norm_reference(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> torch.Tensor:
    """Plain torch form of `add_rms_norm`."""
    return rms_norm_reference(residual_TD.add_(x_TD), weight_D, eps)
