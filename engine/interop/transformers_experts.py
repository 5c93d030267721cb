"""Transformers experts: what an experts module of transformers computes and holds.

transformers stacks the experts of a layer: gate_up_proj [e, 2F, D] and down_proj [e, D, F], or
their transposes, gate and up behind each other or in alternate rows, with biases or without. A
module says which of these it is; what it computes between the two matrices is found by running it
on random numbers beside the engine's activations. Imports nothing of transformers.

Legend: e experts on this rank, D model dim, F expert hidden dim, N 2F with a gate, else F.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from engine.moe.expert_form import ExpertForm
from engine.ops.expert_activation import Activation, activate_reference

_WIDTH, _ROWS = 16, 64  # of the random numbers
_LIMITS, _ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """The experts of one layer: their numbers, widths and form."""

    num_local: int
    hidden: int
    ffn: int
    form: ExpertForm


def experts_shape(experts: nn.Module) -> ExpertsShape:
    """Return what an experts module holds, whose parameters are sharded but need not be loaded.

    Raises:
        ValueError: the engine cannot compute what this module computes; it says why.
    """
    kind = type(experts).__name__
    if not hasattr(experts, "is_transposed"):
        raise ValueError(
            f"{kind}: is not one of transformers' stacked experts (use_experts_implementation), so "
            'it is not known what it computes; use ep_implementation="all_to_all"'
        )
    module: Any = experts
    first, bias = "gate_up_proj" if module.has_gate else "up_proj", module.has_bias
    wanted = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if bias else set())
    found = {name for name, _ in experts.named_parameters()}
    found |= {name for name, _ in experts.named_buffers()}
    if module.has_post_expert_norm or found != wanted:
        more = sorted(found ^ wanted) or ["post_expert_norm"]
        raise ValueError(
            f"{kind}: has or lacks {', '.join(more)} beside {first} and down_proj, of which the "
            'engine\'s experts know nothing; use ep_implementation="all_to_all"'
        )
    matrix = getattr(module, first)
    if matrix.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{kind}: {first} is {str(matrix.dtype).removeprefix('torch.')}, and experts must be "
            "float32, bfloat16 or float16 here; load the model without its quantisation"
        )
    inner, hidden = matrix.shape[1:]
    if module.is_transposed:
        inner, hidden = hidden, inner
    return ExpertsShape(
        num_local=module.num_experts,
        hidden=hidden,
        ffn=inner // 2 if module.has_gate else inner,
        form=_form(module, kind),
    )


def _form(module: Any, kind: str) -> ExpertForm:
    """Return the form whose activation gives what the module's own gives."""
    generator = torch.Generator().manual_seed(0)
    size = (_ROWS, (1 + module.has_gate) * _WIDTH)
    # Large enough that every limit in use bounds some of them.
    plain = 6.0 * torch.randn(size, generator=generator, device="cpu")
    given = plain
    if module.has_gate and not module.is_concatenated:
        given = torch.stack(plain.chunk(2, dim=-1), dim=-1).flatten(-2)
    with torch.no_grad():
        function = module._apply_gate if module.has_gate else module.act_fn
        wanted = function(given.clone())
        for form in _forms(module):
            made = activate_reference(plain, form.rule)
            if torch.allclose(made, wanted, rtol=1e-5, atol=1e-6):
                return form
    raise ValueError(
        f"{kind}: its activation ({type(getattr(module, 'act_fn', module)).__name__}, and how it "
        f"gates) is none of the engine's ({', '.join(get_args(Activation))}); use "
        'ep_implementation="all_to_all"'
    )


def _forms(module: Any) -> Iterator[ExpertForm]:
    """Yield the forms that the module may have."""
    limits: list[float | None] = [None]
    limits += [float(value) for name in _LIMITS if (value := getattr(module, name, None))]
    alphas = [float(value) for name in _ALPHAS if (value := getattr(module, name, None))]
    for activation in get_args(Activation):
        if activation == "gpt_oss" and not module.has_gate:
            continue
        for limit in limits:
            for alpha in alphas if activation == "gpt_oss" and alphas else [1.702]:
                yield ExpertForm(
                    activation=activation,
                    gated=module.has_gate,
                    bias=module.has_bias,
                    limit=limit,
                    alpha=alpha,
                )


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
