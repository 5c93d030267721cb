"""engine/moe/gate.py: which weights a router has. Run: pytest tests/unit/moe/test_gate.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.moe.gate import Gate
from engine.moe.router import RouterSpec

CPU, EXPERTS, HIDDEN = torch.device("cpu"), 6, 8


def gate_of(dtype: torch.dtype = torch.float32, **fields: Any) -> Gate:
    return Gate(RouterSpec(num_experts=EXPERTS, top_k=2, **fields), HIDDEN, CPU, dtype)


def shapes_of(gate: Gate) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in gate.named_parameters()}


def test_a_plain_router_is_its_weight_alone():
    assert shapes_of(gate_of()) == {"weight_ED": (EXPERTS, HIDDEN)}


@pytest.mark.parametrize(
    ("fields", "name", "shape", "dtype"),
    [
        ({"correction_bias": True}, "correction_bias_E", (EXPERTS,), torch.float32),
        ({"logit_bias": True}, "logit_bias_E", (EXPERTS,), torch.bfloat16),
        (
            {"logit_bias": True, "float32_logits": True},
            "logit_bias_E",
            (EXPERTS,),
            torch.float32,
        ),
        ({"expert_scale": True}, "expert_scale_E", (EXPERTS,), torch.float32),
        ({"token_table": 11}, "table_VK", (11, 2), torch.int64),
    ],
)
def test_a_form_adds_one_tensor(fields, name, shape, dtype):
    gate = gate_of(torch.bfloat16, **fields)
    assert shapes_of(gate) == {"weight_ED": (EXPERTS, HIDDEN), name: shape}
    assert getattr(gate, name).dtype == dtype
    assert gate.weight_ED.dtype == (dtype if name == "logit_bias_E" else torch.bfloat16)


def test_zero_experts_have_logits_and_corrections():
    gate = gate_of(num_zero_experts=3, correction_bias=True)
    assert shapes_of(gate) == {"weight_ED": (9, HIDDEN), "correction_bias_E": (9,)}


def test_a_table_needs_token_ids_and_gives_their_experts():
    gate = gate_of(token_table=3)
    assert gate.table_VK is not None
    gate.weight_ED.copy_(torch.randn(EXPERTS, HIDDEN))
    gate.table_VK.copy_(torch.tensor([[0, 1], [5, 2], [3, 4]]))
    x = torch.randn(2, HIDDEN)
    assert gate.route(x, torch.tensor([2, 1])).topk_ids_TK.tolist() == [[3, 4], [5, 2]]
    with pytest.raises(AssertionError, match="needs token ids"):
        gate.route(x)
