"""Experts of every form against their definition, on every backend.

Run: python -m pytest tests/unit/moe/test_expert_form.py
"""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F

from engine.moe.backend_choice import find_grouped_mm
from engine.moe.copy_weights import copy_parts, read_home
from engine.moe.expert_form import ExpertForm
from engine.moe.experts import ExpertWeights, make_backend
from engine.moe.local_experts import LocalExperts
from engine.moe.placement.placement import Precision
from tests.helpers.layer_cases import activated
from tests.helpers.ops_cases import each_isa, on_isa

EXPERTS, HIDDEN, FFN = 4, 40, 24
COUNTS = [3, 0, 17, 1]
CPU = torch.device("cpu")
FORMS = {
    "gpt-oss": ExpertForm(activation="gpt_oss", bias=True, limit=0.7),
    "biases": ExpertForm(bias=True),
    "a limit": ExpertForm(limit=0.5),
    "gelu": ExpertForm(activation="gelu"),
    "gelu by tanh": ExpertForm(activation="gelu_tanh", bias=True),
    "relu2 without gate": ExpertForm(activation="relu2", gated=False),
    "silu without gate": ExpertForm(gated=False, bias=True, limit=0.5),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


class GroupedLinear(torch.nn.Module):
    """What Transformer Engine's does, by torch."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **_: object) -> None:
        super().__init__()
        self.num_gemms = num_gemms

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        parts = zip(inp.split(m_splits), weights, strict=True)
        return torch.cat([F.linear(x, weight) for x, weight in parts])


@pytest.fixture(params=["torch", "grouped_mm", "te"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend; Transformer Engine is emulated."""
    if request.param == "grouped_mm" and find_grouped_mm() is None:
        pytest.skip("this torch has no grouped_mm")
    if request.param == "te":
        te = types.ModuleType("transformer_engine.pytorch")
        te.GroupedLinear = GroupedLinear  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setattr("engine.moe.experts.import_transformer_engine", lambda: te)
    return request.param


def fill(weights: ExpertWeights) -> ExpertWeights:
    generator = torch.Generator().manual_seed(0)
    for weight in weights.tensors:
        scale = 1.0 if weight.dim() == 2 else 2 * weight.shape[-1] ** -0.5
        weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return weights


def weights_of(form: ExpertForm, dtype: torch.dtype = torch.float32) -> ExpertWeights:
    return fill(ExpertWeights(EXPERTS, HIDDEN, FFN, CPU, dtype, form))


def rows_of(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(sum(COUNTS), HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected_of(weights: ExpertWeights, rows_RD: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The definition, row by row in double precision."""
    form, outputs, row = weights.form, [], 0
    each = [weight.double() for weight in weights.tensors]
    w13, w2, *biases = each
    for expert, count in enumerate(counts):
        for x_D in rows_RD[row : row + count].double():
            hidden = w13[expert] @ x_D + (biases[0][expert] if biases else 0)
            outputs.append(w2[expert] @ activated(hidden, form))
            outputs[-1] += biases[1][expert] if biases else 0
        row += count
    return torch.stack(outputs)


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_what_its_expert_is_defined_to_compute(backend, form, dtype):
    # On the CPU rows are float32 beside bfloat16 weights, which `torch` brings into panels.
    weights, rows_RD = (
        weights_of(form, dtype),
        rows_of(torch.float32 if backend == "torch" else dtype),
    )
    expected = expected_of(weights, rows_RD, COUNTS)
    run = make_backend(backend, weights)
    run.finalize_weights()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for _ in range(2):  # rows and weights are as they were
        got = run(rows_RD, COUNTS).double()
        atol = tolerance * float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=atol)


@each_form
def test_rows_may_lie_in_any_order(backend, form):
    weights, rows_RD = weights_of(form), rows_of()
    run = make_backend(backend, weights)
    index_R = torch.randperm(len(rows_RD), generator=torch.Generator().manual_seed(2))
    grouped = run(rows_RD[index_R], COUNTS)
    got = run(rows_RD, COUNTS, torch.empty_like(rows_RD), index_R)
    torch.testing.assert_close(got[index_R], grouped, rtol=1e-6, atol=1e-6)


@each_isa
@each_form
def test_a_row_has_the_same_bits_whatever_runs_with_it(isa, form):
    if isa == "torch":
        pytest.skip("BLAS does not promise it")
    with on_isa(isa):
        weights, rows_RD = weights_of(form), rows_of()
        run = make_backend("torch", weights)
        run.finalize_weights()
        together, row = run(rows_RD, COUNTS), 0
        for expert, count in enumerate(COUNTS):
            for _ in range(count):
                alone = [int(each == expert) for each in range(EXPERTS)]
                assert torch.equal(run(rows_RD[row : row + 1], alone)[0], together[row])
                row += 1


def test_gpt_oss_computes_what_transformers_computes():
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS, swiglu_limit=0.7
    )
    theirs = GptOssExperts(config)
    weights, rows_RD = weights_of(FORMS["gpt-oss"]), rows_of()
    assert weights.b13_e2F is not None and weights.b2_eD is not None
    alternating = weights.w13_e2FD.unflatten(1, (2, FFN)).transpose(1, 2).flatten(1, 2)
    theirs.gate_up_proj.data = alternating.transpose(1, 2).contiguous()
    theirs.gate_up_proj_bias.data = weights.b13_e2F.unflatten(1, (2, FFN)).mT.flatten(1)
    theirs.down_proj.data = weights.w2_eDF.transpose(1, 2).contiguous()
    theirs.down_proj_bias.data = weights.b2_eD
    expert_R1 = torch.repeat_interleave(torch.tensor(COUNTS))[:, None]
    with torch.no_grad():
        expected = theirs(rows_RD, expert_R1, torch.ones(len(rows_RD), 1))
    got = make_backend("torch", weights)(rows_RD, COUNTS)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def local_experts(form: ExpertForm, precision: Precision = "model") -> LocalExperts:
    return LocalExperts(
        3, 1, precision, hidden=HIDDEN, ffn=FFN, backend="torch", device=CPU,
        dtype=torch.float32, form=form,
    )  # fmt: skip


@each_form
def test_a_copy_that_is_moved_computes_what_its_home_does(form):
    experts = local_experts(form)
    fill(experts.stacked)
    experts.finalize_weights()
    parts = list(zip(read_home(experts, 1), copy_parts(experts, 0), strict=True))
    assert sum(home.numel() for home, _ in parts) == experts.copy_size == experts.copy_bytes
    for home, copy in parts:
        copy.copy_(home)
    rows_RD = rows_of()[:4]
    home, copy = experts(rows_RD, [0, 4, 0, 0]), experts(rows_RD, [0, 0, 0, 4])
    assert torch.equal(home, copy)


def test_low_bit_copies_of_other_forms_are_refused():
    with pytest.raises(
        ValueError, match=r"moe\.placement: int8 copies .* gpt_oss, biases, a limit"
    ):
        local_experts(FORMS["gpt-oss"], "int8")


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"limit": 0.0}, "swiglu_limit: 0"), ({"activation": "gpt_oss", "gated": False}, "a gate")],
)
def test_fields_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ExpertForm(**fields)
