"""Zero experts: the choice between experts and zero experts, and what the latter add to an output.

A zero expert returns the token itself. Its assignments leave the choice as the id -1 with the
weight 0, and the weights of all that a token has chosen are added up: token times this sum is what
they give together.

Legend: T tokens, E experts, Z zero experts, K top-k, D model dim.
"""

import torch

from engine.ops import triton_support
from engine.ops.select_experts import (
    SelectionRule,
    select_experts,
    select_experts_reference,
)


def select_with_zero_experts(
    logits_TL: torch.Tensor, bias_L: torch.Tensor | None, rule: SelectionRule, num_zero: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose as `select_experts` does, from E experts and Z zero experts; no host sync.

    Return scores_TE (float32, of the experts alone), topk_ids_TK (int64, best first, -1 for a zero
    expert), topk_weights_TK (float32, 0 where the id is -1) and the sum of the weights of each
    token's zero experts, float32 [T].

    Args:
        logits_TL: L = E + Z columns, the zero experts last.
        bias_L: float32; None: no bias.
        rule: of the choice, over all L columns.
        num_zero: Z, at least 1.
    """
    if triton_support.serves(logits_TL):
        from engine.ops.gpu.select_experts import select_with_zero_experts_triton

        return select_with_zero_experts_triton(logits_TL, bias_L, rule, num_zero)
    return _without_zero_experts(*select_experts(logits_TL, bias_L, rule), num_zero)


def select_with_zero_experts_reference(
    logits_TL: torch.Tensor, bias_L: torch.Tensor | None, rule: SelectionRule, num_zero: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plain torch form of `select_with_zero_experts`."""
    return _without_zero_experts(*select_experts_reference(logits_TL, bias_L, rule), num_zero)


def _without_zero_experts(
    scores_TL: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_zero: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_experts = scores_TL.shape[1] - num_zero
    is_zero_TK = ids_TK >= num_experts
    return (
        scores_TL[:, :num_experts].contiguous(),
        ids_TK.masked_fill(is_zero_TK, -1),
        weights_TK.masked_fill(is_zero_TK, 0.0),
        weights_TK.where(is_zero_TK, 0.0).sum(1),
    )


def add_zero_experts(
    out_TD: torch.Tensor, x_TD: torch.Tensor, weight_T: torch.Tensor
) -> torch.Tensor:
    """Return out_TD + weight_T * x_TD, [T, D] in their dtype: computed in float32, rounded once.

    weight_T: float32.
    """
    if triton_support.serves(out_TD):
        from engine.ops.gpu.add_zero_experts import add_zero_experts_triton

        return add_zero_experts_triton(out_TD, x_TD, weight_T)
    return add_zero_experts_reference(out_TD, x_TD, weight_T)


def add_zero_experts_reference(
    out_TD: torch.Tensor, x_TD: torch.Tensor, weight_T: torch.Tensor
) -> torch.Tensor:
    """Plain torch form of `add_zero_experts`."""
    return torch.addcmul(out_TD.float(), x_TD.float(), weight_T[:, None]).to(out_TD.dtype)
