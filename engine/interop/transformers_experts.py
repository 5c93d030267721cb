"""Transformers experts: whether the engine serves an experts module, and the weights it takes over.

What a module holds and computes is read by `engine/moe/stacked_experts.py`.

Legend: e experts on this rank, D model dim, F expert hidden dim, N 2F with a gate, else F.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from engine.moe.stacked_experts import StackedExperts, is_stacked, read_stacked

_INSTEAD = 'use ep_implementation="all_to_all"'


def experts_shape(experts: nn.Module) -> StackedExperts:
    """Return what an experts module holds, whose parameters are sharded but need not be loaded.

    Raises:
        ValueError: the engine cannot compute what this module computes; it says why.
    """
    kind = type(experts).__name__
    if not is_stacked(experts):
        raise ValueError(
            f"{kind}: is not one of transformers' stacked experts (use_experts_implementation), so "
            f"it is not known what it computes; {_INSTEAD}"
        )
    try:
        shape = read_stacked(experts)
    except ValueError as error:
        raise ValueError(f"{error}; {_INSTEAD}") from error
    for name, weight in experts.named_parameters():
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{kind}: {name} is {str(weight.dtype).removeprefix('torch.')}, and experts must "
                "be float32, bfloat16 or float16 here; load the model without its quantisation"
            )
    return shape


def take_weights(experts: nn.Module, bias_dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the experts' weights as the engine stacks them, and leave the module with parameters
    on the meta device: [e, N, D], [e, D, F] and where there are biases [e, N] and [e, D].

    A matrix that the module stacks alike is not copied. Without the placeholders a caller could
    save what the engine has rearranged.

    Args:
        bias_dtype: of the biases.
    """
    module: Any = experts
    first = "gate_up_proj" if module.has_gate else "up_proj"
    alternates = module.has_gate and not module.is_concatenated
    taken = []
    for name, is_first, is_bias in (
        (first, True, False),
        ("down_proj", False, False),
        (f"{first}_bias", True, True),
        ("down_proj_bias", False, True),
    ):
        weight = experts._parameters.pop(name, None)
        if weight is None:
            continue
        made = weight.detach()
        if module.is_transposed and not is_bias:
            made = made.transpose(1, 2)
        if alternates and is_first:
            made = torch.cat((made[:, 0::2], made[:, 1::2]), dim=1)
        taken.append((made.to(bias_dtype) if is_bias else made).contiguous())
        experts._parameters[name] = nn.Parameter(
            torch.empty_like(weight, device="meta"), requires_grad=False
        )
    return taken
