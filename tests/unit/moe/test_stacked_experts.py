"""What a module of stacked experts holds and computes, found on modules without memory.

Run: python -m pytest tests/unit/moe/test_stacked_experts.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.moe.expert_form import ExpertForm
from engine.moe.stacked_experts import StackedExperts, is_stacked, read_stacked

EXPERTS, HIDDEN, FFN = 3, 8, 6


def experts(gate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], **marks: Any) -> nn.Module:
    """A module like transformers', on the meta device."""
    module: Any = nn.Module()
    module.has_gate, module.is_concatenated, module.has_post_expert_norm = True, True, False
    module.is_transposed, module.has_bias = False, False
    for name, value in marks.items():
        setattr(module, name, value)

    def apply(rows: torch.Tensor) -> torch.Tensor:
        if module.is_concatenated:
            return gate(*rows.chunk(2, dim=-1))
        return gate(rows[..., ::2], rows[..., 1::2])

    module._apply_gate = apply
    for name, shape in {"gate_up_proj": (2 * FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}.items():
        inner = shape[::-1] if module.is_transposed else shape
        module.register_parameter(name, nn.Parameter(torch.empty(EXPERTS, *inner, device="meta")))
        if module.has_bias:
            bias = nn.Parameter(torch.empty(EXPERTS, shape[0], device="meta"))
            module.register_parameter(f"{name}_bias", bias)
    return module


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def bounded(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return swiglu(gate.clamp(max=5.0), up.clamp(-5.0, 5.0))


def bounded_late(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate).clamp(max=5.0) * up.clamp(-5.0, 5.0)


@pytest.mark.parametrize(
    ("gate", "marks", "found"),
    [
        (swiglu, {}, {}),
        (swiglu, {"is_transposed": True}, {"transposed": True}),
        (swiglu, {"is_concatenated": False}, {"alternating": True}),
        (swiglu, {"has_bias": True}, {"form": ExpertForm(bias=True)}),
        (bounded, {"limit": 5.0}, {"form": ExpertForm(limit=5.0)}),
        (bounded, {"swiglu_limit": 5.0}, {"form": ExpertForm(limit=5.0)}),
        (swiglu, {"limit": 5.0}, {}),
        (lambda gate, up: F.gelu(gate) * up, {}, {"form": ExpertForm(activation="gelu")}),
    ],
    ids=["plain", "transposed", "alternating", "biases", "limit", "swiglu", "unused", "gelu"],
)
def test_number_widths_form_and_layout_are_found(gate, marks, found):
    module = experts(gate, **marks)
    assert is_stacked(module)
    plain = {"num_experts": EXPERTS, "hidden": HIDDEN, "ffn": FFN, "form": ExpertForm()}
    assert read_stacked(module) == StackedExperts(**plain | found)


@pytest.mark.parametrize(
    ("gate", "marks", "said"),
    [
        (bounded_late, {"limit": 5.0}, "its activation"),
        (bounded, {}, "its activation"),
        (swiglu, {"has_post_expert_norm": True}, "post_expert_norm"),
    ],
    ids=["bounded behind the activation", "a bound nobody names", "norm"],
)
def test_what_the_engine_does_not_compute_is_refused_by_name(gate, marks, said):
    with pytest.raises(ValueError, match=said):
        read_stacked(experts(gate, **marks))


def test_a_module_without_the_marks_is_no_stack_of_experts():
    assert not is_stacked(nn.Linear(2, 2))
