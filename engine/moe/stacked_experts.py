"""Stacked experts: what a module that stacks a layer's experts holds and computes.

Such modules are transformers': gate_up_proj [e, 2F, D] and down_proj [e, D, F], or their
transposes, gate and up behind each other or in alternate rows, with biases or without. A module
says which of these it is; what it computes between the two matrices is found by running it on
random numbers beside the engine's activations. Imports nothing of transformers.

Legend: e experts that the module holds, D model dim, F expert hidden dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn

from engine.moe.expert_form import ExpertForm
from engine.ops.expert_activation import Activation, activate_reference

_MARKS = ("has_gate", "has_bias", "is_concatenated", "is_transposed")  # of transformers' decorator
_WIDTH, _ROWS = 16, 64  # of the random numbers
_LIMITS, _ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedExperts:
    """The experts that a module holds: their number, widths, form and layout."""

    num_experts: int  # that the module holds
    hidden: int
    ffn: int
    form: ExpertForm
    transposed: bool = False  # matrices are [e, inputs, outputs]
    alternating: bool = False  # rows of gate and up alternate


def is_stacked(module: nn.Module) -> bool:
    """Return whether a module goes through transformers' experts interface."""
    return all(hasattr(module, mark) for mark in _MARKS)


def read_stacked(experts: nn.Module) -> StackedExperts:
    """Return what an experts module holds, whose parameters may be on any device.

    Args:
        experts: of which `is_stacked` is true.

    Raises:
        ValueError: saying what of it the engine's experts do not compute.
    """
    module: Any = experts
    kind = type(experts).__name__
    first, bias = "gate_up_proj" if module.has_gate else "up_proj", bool(module.has_bias)
    wanted = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if bias else set())
    found = {name for name, _ in experts.named_parameters()}
    found |= {name for name, _ in experts.named_buffers()}
    if getattr(module, "has_post_expert_norm", False) or found != wanted:
        more = sorted(found ^ wanted) or ["post_expert_norm"]
        raise ValueError(
            f"{kind}: has or lacks {', '.join(more)} beside {first} and down_proj, of which the "
            "engine's experts know nothing"
        )
    num_experts, inner, hidden = getattr(module, first).shape
    if module.is_transposed:
        inner, hidden = hidden, inner
    return StackedExperts(
        num_experts=num_experts,
        hidden=hidden,
        ffn=inner // 2 if module.has_gate else inner,
        form=_form(module, kind),
        transposed=bool(module.is_transposed),
        alternating=bool(module.has_gate and not module.is_concatenated),
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
        f"gates) is none of the engine's ({', '.join(get_args(Activation))})"
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
                    gated=bool(module.has_gate),
                    bias=bool(module.has_bias),
                    limit=limit,
                    alpha=alpha,
                )
