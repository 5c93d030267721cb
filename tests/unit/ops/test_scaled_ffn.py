"""engine/ops/scaled_ffn.py: the FFN of FP8 experts on rows that are rounded to FP8."""

from __future__ import annotations

import pytest
import torch

from engine.ops.grouped_ffn import grouped_ffn_reference
from engine.ops.quantised_rows import (
    FloatLayout,
    bytes_of_rows,
    empty_weights,
    parts_of,
    round_to,
    set_rows,
)
from engine.ops.scaled_ffn import (
    RowWeights,
    round_rows,
    scaled_ffn,
    scaled_product,
    silu_and_round,
)

COUNTS, HIDDEN, FFN = [3, 0, 7, 1], 64, 48
LAYOUT = FloatLayout("fp8", (1, 1 << 30), in_rows=True)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def made(outputs: int, inputs: int) -> RowWeights:
    weights = round_to(torch.randn(len(COUNTS), outputs, inputs) * inputs**-0.5, LAYOUT)
    assert isinstance(weights, RowWeights)
    return weights


def values(weights: RowWeights) -> torch.Tensor:
    return torch.stack([weights.dequantised(e, torch.float32) for e in range(weights.num_experts)])


def test_a_row_keeps_its_largest_number_and_four_bits_of_the_others():
    x = torch.randn(9, HIDDEN) * torch.logspace(-20, 20, 9)[:, None]
    x[4] = 0
    codes, scale = round_rows(x)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (9,)
    back = codes.float() * scale[:, None]
    largest = x.abs().amax(1)
    assert torch.allclose(back.abs().amax(1), largest, rtol=1e-6)
    assert bool(((back - x).abs() <= x.abs() / 16 + largest[:, None] * 2**-10 / 448).all())
    assert not back[4].any()


def test_the_product_is_that_of_the_dequantised_rows_and_weights():
    weights, x = made(32, HIDDEN), torch.randn(sum(COUNTS), HIDDEN)
    codes, scale = round_rows(x)
    ends = torch.tensor(COUNTS).cumsum(0).int()
    got = scaled_product(codes, scale, weights, ends, torch.float32)
    expert = torch.tensor([0] * 3 + [2] * 7 + [3])
    rounded = codes.double() * scale.double()[:, None]
    expected = torch.einsum("rk,rnk->rn", rounded, values(weights).double()[expert])
    assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_lie_where_their_rows_are_and_others_are_left(dtype):
    w13, w2 = made(2 * FFN, HIDDEN), made(HIDDEN, FFN)
    x = torch.randn(sum(COUNTS) + 5, HIDDEN).to(dtype)
    index = torch.randperm(len(x))[: sum(COUNTS)]
    grouped = scaled_ffn(x[index], w13, w2, COUNTS)
    out = torch.full_like(x, 7)
    assert scaled_ffn(x, w13, w2, COUNTS, out, index) is out
    assert torch.equal(out[index], grouped)
    others = torch.ones(len(x), dtype=torch.bool).index_fill(0, index, False)
    assert bool((out[others] == 7).all())
    assert torch.equal(scaled_ffn(x, w13, w2, [0] * 4, out, index[:0]), out)
    # Rounding the rows twice, to four bits each.
    expected = grouped_ffn_reference(x[index].float(), values(w13), values(w2), COUNTS)
    error = (grouped.float() - expected).norm() / expected.norm()
    assert 0.005 < error < 0.06


def test_what_lies_between_the_products_is_rounded_behind_swiglu():
    gate_up = torch.randn(5, 2 * FFN)
    gate, up = gate_up.chunk(2, 1)
    for mine, theirs in zip(
        silu_and_round(gate_up), round_rows(torch.nn.functional.silu(gate) * up), strict=True
    ):
        assert torch.equal(mine.float(), theirs.float())


def test_matrices_filled_part_by_part_equal_those_rounded_at_once():
    rounded = made(40, HIDDEN)
    held = empty_weights(LAYOUT, len(COUNTS), 40, HIDDEN, CPU, 20)
    for expert in range(len(COUNTS)):
        for first, end in ((0, 7), (7, 40)):
            codes, scale = (part[None, first:end] for part in parts_of(rounded, expert))
            set_rows(held, expert, first, RowWeights(codes, scale))
    assert isinstance(held, RowWeights)
    assert torch.equal(values(held), values(rounded))
    assert held.num_bytes == len(COUNTS) * bytes_of_rows(held, 40) == len(COUNTS) * 40 * (64 + 4)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        round_to(torch.full((1, 16, 16), torch.inf), LAYOUT)
