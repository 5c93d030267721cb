"""Rotary position embedding, rotate-half form, on queries and keys in place.

Legend: T tokens, H query heads, G kv heads, D head dim, R rotated dims (even, R <= D).
Source: Su et al., RoFormer, 2021, section 3.2, with the halves of the head as the pairs.
"""

import torch

from engine.ops import native


def apply_rotary(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates the first R dims of every head of q and k IN PLACE and returns the same two tensors.

    cos_TR and sin_TR [T, R] hold each of the R / 2 angles twice (first half equals second half).
    Dims R .. D pass unchanged. q and k may be strided views with a contiguous last dim.
    """
    if native.serves(q_THD, k_TGD, cos_TR, sin_TR):
        torch.ops.lockstep_cpu.apply_rotary(q_THD, k_TGD, cos_TR, sin_TR)
        return q_THD, k_TGD
    return apply_rotary_reference(q_THD, k_TGD, cos_TR, sin_TR)


def apply_rotary_reference(
    q_THD: torch.Tensor, k_TGD: torch.Tensor, cos_TR: torch.Tensor, sin_TR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch form of `apply_rotary`."""
    cos_T1R, sin_T1R = cos_TR.unsqueeze(1), sin_TR.unsqueeze(1)
    for x_THD in (q_THD, k_TGD):
        x_THR = x_THD[..., : cos_TR.shape[-1]]
        first, second = x_THR.chunk(2, dim=-1)
        x_THR.copy_(x_THR * cos_T1R + torch.cat((-second, first), dim=-1) * sin_T1R)
    return q_THD, k_TGD
