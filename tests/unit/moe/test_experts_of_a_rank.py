"""engine.moe.local_experts: homes and copies of a rank behind one call, whatever the backend."""

from __future__ import annotations

import types

import pytest
import torch
from torch.nn import functional

from engine.layers.precision import compute_dtype
from engine.moe.backend_choice import find_grouped_mm
from engine.moe.local_experts import LocalExperts
from engine.ops import native
from engine.ops.grouped_ffn import grouped_ffn, grouped_ffn_reference
from engine.ops.quantised import QuantisedWeights, dequantise, grouped_ffn_quantised, quantise

HOMES, COPIES, HIDDEN, FFN = 2, 3, 32, 48
# Rows of two homes and three copies.
COUNTS = {
    "some": [3, 5, 2, 0, 4],
    "no rows of copies": [3, 5, 0, 0, 0],
    "no rows of homes": [0, 0, 1, 6, 2],
    "no rows": [0] * 5,
    "one row": [0, 0, 0, 1, 0],
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class GroupedLinear(torch.nn.Module):
    """What Transformer Engine's does, by torch."""

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **_: object) -> None:
        super().__init__()
        self.num_gemms = num_gemms

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        parts = inp.split(m_splits)
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        return torch.cat(
            [functional.linear(x, weight) for x, weight in zip(parts, weights, strict=True)]
        )


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


def weights_of(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    experts = HOMES + COPIES
    w13 = torch.randn(experts, 2 * FFN, HIDDEN, generator=generator) * HIDDEN**-0.5
    w2 = torch.randn(experts, HIDDEN, FFN, generator=generator) * FFN**-0.5
    return w13.to(dtype), w2.to(dtype)


def experts_of(backend: str, precision, dtype: torch.dtype, copies: int = COPIES) -> LocalExperts:
    experts = LocalExperts(
        HOMES,
        copies,
        precision,
        hidden=HIDDEN,
        ffn=FFN,
        backend=backend,
        device=torch.device("cpu"),
        dtype=dtype,
    )
    w13, w2 = weights_of(dtype)
    for local in range(HOMES + copies):
        experts.set_weights(local, w13[local], w2[local])
    experts.finalize_weights()
    return experts


def expected(rows: torch.Tensor, counts: list[int], precision, dtype: torch.dtype) -> torch.Tensor:
    """In float32 from the weights that each instance has."""
    w13, w2 = (weight.float() for weight in weights_of(dtype))
    if precision != "model":
        bits = 8 if precision == "int8" else 4
        for weight in (w13, w2):
            weight[HOMES:] = dequantise(quantise(weight[HOMES:], bits, 32))
    return grouped_ffn_reference(rows.float(), w13[: len(counts)], w2[: len(counts)], counts)


def rows_of(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
@pytest.mark.parametrize("load", COUNTS)
def test_each_row_is_computed_by_its_instance_wherever_it_lies(backend, load, precision, dtype):
    counts = COUNTS[load]
    # Of the model: float32 on the CPU, where Transformer Engine does not run.
    row_dtype = dtype if backend == "te" else compute_dtype(dtype, torch.device("cpu"))
    experts, rows = experts_of(backend, precision, dtype), rows_of(sum(counts), row_dtype)
    wanted = expected(rows, counts, precision, dtype)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for out in (None, torch.full_like(rows, torch.nan)):
        made = experts(rows, counts, out)
        assert made.dtype == row_dtype
        torch.testing.assert_close(made.float(), wanted, **close)
    index = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    apart = torch.empty_like(rows).index_copy_(0, index, rows)
    for out in (None, torch.full_like(rows, torch.nan)):
        found = experts(apart, counts, out, index)
        torch.testing.assert_close(found[index].float(), wanted, **close)
        assert torch.equal(found[index], made), "where a row lies changes its result"


def test_homes_alone_are_the_backend_itself(backend):
    experts, counts = experts_of(backend, "int4", torch.float32, copies=0), [4, 3]
    rows = rows_of(7, torch.float32)
    wanted = expected(rows, counts, "model", torch.float32)
    torch.testing.assert_close(experts(rows, counts), wanted, rtol=1e-5, atol=1e-5)
    assert experts.copy_bytes == 0


@pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")
def test_an_index_of_some_rows_leaves_the_others_and_changes_no_bit():
    w13, w2 = weights_of(torch.float32)
    low: tuple[QuantisedWeights, QuantisedWeights] = (quantise(w13, 4), quantise(w2, 4))
    counts, rows = COUNTS["some"], rows_of(20, torch.float32)
    index = torch.randperm(20, generator=torch.Generator().manual_seed(3))[: sum(counts)]
    others = torch.ones(20, dtype=torch.bool).index_fill_(0, index, False)
    for run, weights in ((grouped_ffn, (w13, w2)), (grouped_ffn_quantised, low)):
        grouped = run(rows[index], *weights, counts)  # pyright: ignore[reportArgumentType]
        out = torch.full_like(rows, 7.0)
        assert run(rows, *weights, counts, out, index) is not None  # pyright: ignore[reportArgumentType]
        assert torch.equal(out[index], grouped)
        assert (out[others] == 7.0).all()
        with pytest.raises(RuntimeError, match="counts sum to"):
            run(rows, *weights, counts, out, index[1:])  # pyright: ignore[reportArgumentType]
        with pytest.raises(RuntimeError, match="index"):
            run(rows, *weights, counts, out, index + 20)  # pyright: ignore[reportArgumentType]
