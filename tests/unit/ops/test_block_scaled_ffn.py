"""engine/ops/block_scaled_ffn.py: the FFN of FP8 experts in blocks, by DeepGEMM's contract."""

from __future__ import annotations

import sys

import pytest
import torch

from engine.ops import block_scaled_ffn as op
from engine.ops.block_scaled_ffn import BLOCK, BlockWeights, RowLayout, place_and_round
from engine.ops.grouped_ffn import grouped_ffn_reference
from engine.ops.quantised_rows import (
    FloatLayout,
    bytes_of_rows,
    empty_weights,
    pack_floats,
    parts_of,
    round_to,
    set_rows,
)
from tests.helpers.fake_deep_gemm import ContractError, fake_module

HIDDEN, FFN = 256, 128
LAYOUT = FloatLayout("fp8", (BLOCK, BLOCK), in_rows=True)
LOADS = {
    "few, some without": [3, 0, 7, 1],
    "many, some without": [40, 0, 130, 1],
    "one has all, few": [0, 0, 9, 0],
    "one has all, many": [0, 300, 0, 0],
    "fewer rows than experts": [0, 1, 0, 1],
    "whole blocks": [128, 256, 0, 128],
}


@pytest.fixture(autouse=True)
def library(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_module())


def made(outputs: int, inputs: int, experts: int = 4) -> BlockWeights:
    weights = round_to(torch.randn(experts, outputs, inputs) * inputs**-0.5, LAYOUT)
    assert isinstance(weights, BlockWeights)
    return weights


def values(weights: BlockWeights) -> torch.Tensor:
    return torch.stack([weights.dequantised(e, torch.float32) for e in range(weights.num_experts)])


def placed_rows(x: torch.Tensor, counts: list[int]) -> tuple[op.PlacedRows, torch.Tensor]:
    counts_e = torch.tensor(counts, dtype=torch.int32)
    layout = RowLayout.of(len(x), len(counts), BLOCK)
    ends_e = counts_e.cumsum(0, dtype=torch.int32)
    return place_and_round(x, None, counts_e, ends_e, layout), counts_e


@pytest.mark.parametrize("load", LOADS)
def test_an_experts_rows_begin_where_the_library_wants_them(load):
    counts = LOADS[load]
    layout = RowLayout.of(sum(counts), 4, BLOCK)
    placed, _ = placed_rows(torch.randn(sum(counts), HIDDEN), counts)
    assert layout.rows == len(placed.owner_P) == len(placed.codes_PI)
    begin, number = 0, 0
    for expert, count in enumerate(counts):
        begin = begin if layout.alignment else expert * layout.slab
        assert begin % BLOCK == 0
        expected = list(range(begin, begin + count))
        assert placed.place_R[number : number + count].tolist() == expected
        assert placed.owner_P[expected].tolist() == [expert] * count
        begin, number = -(-(begin + count) // BLOCK) * BLOCK, number + count
    assert int((placed.owner_P >= 0).sum()) == sum(counts)


def test_no_distribution_of_rows_needs_more_places_than_there_are():
    for experts in (1, 3, 200):
        for rows in (1, 2, 3, 127, 128, 129, 1000):
            layout = RowLayout.of(rows, experts, BLOCK)
            assert layout.rows % BLOCK == 0
            if not layout.alignment:
                assert rows <= layout.slab and layout.rows == experts * layout.slab
                continue
            most = min(experts, rows)  # all but one expert have a single row
            assert (most - 1) * BLOCK + -(-(rows - most + 1) // BLOCK) * BLOCK <= layout.rows


def test_128_columns_of_a_row_keep_their_largest_number_and_four_bits_of_the_others():
    x = torch.randn(9, 2, BLOCK) * torch.logspace(-20, 20, 18).view(9, 2, 1)
    x[4, 1] = 0
    placed, _ = placed_rows(x.flatten(1), [4, 0, 5, 0])
    scale = placed.scale_SGM.transpose(1, 2).flatten(0, 1)[placed.place_R]
    back = placed.codes_PI[placed.place_R].float().view_as(x) * scale[..., None]
    largest = x.abs().amax(2, keepdim=True)
    assert torch.allclose(back.abs().amax(2, keepdim=True), largest, rtol=1e-6)
    assert bool(((back - x).abs() <= x.abs() / 16 + largest * 2**-10 / 448).all())
    assert not back[4, 1].any()


@pytest.mark.parametrize("load", LOADS)
def test_the_librarys_product_is_that_of_the_dequantised_rows_and_weights(load):
    counts, weights = LOADS[load], made(384, HIDDEN)
    x = torch.randn(sum(counts), HIDDEN)
    placed, counts_e = placed_rows(x, counts)
    got = op.library_product(placed[:2], weights, counts_e, placed.owner_P, 2, torch.bfloat16)
    plain = op.block_product(placed[:2], weights, counts_e, placed.owner_P, 2, torch.float32)
    expert = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    scale = placed.scale_SGM.transpose(1, 2).flatten(0, 1)[placed.place_R]
    rounded = placed.codes_PI[placed.place_R].double()
    rounded *= scale.repeat_interleave(BLOCK, 1)
    expected = torch.einsum("rk,rnk->rn", rounded, values(weights).double()[expert])
    assert torch.allclose(plain[placed.place_R].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(got[placed.place_R].double(), expected, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("product", [op.block_product, op.library_product])
@pytest.mark.parametrize("load", LOADS)
def test_results_lie_where_their_rows_are_and_others_are_left(product, load, monkeypatch):
    monkeypatch.setattr(op, "block_product", product)
    counts, w13, w2 = LOADS[load], made(2 * FFN, HIDDEN), made(HIDDEN, FFN)
    x = torch.randn(sum(counts) + 5, HIDDEN).to(torch.bfloat16)
    index = torch.randperm(len(x))[: sum(counts)]
    grouped = op.block_scaled_ffn(x[index], w13, w2, counts)
    out = torch.full_like(x, 7)
    assert op.block_scaled_ffn(x, w13, w2, counts, out, index) is out
    assert torch.equal(out[index], grouped)
    others = torch.ones(len(x), dtype=torch.bool).index_fill(0, index, False)
    assert bool((out[others] == 7).all())
    # Rounding the rows twice, to four bits each.
    expected = grouped_ffn_reference(x[index].float(), values(w13), values(w2), counts)
    error = (grouped.float() - expected).norm() / expected.norm()
    assert 0.005 < error < 0.06


def test_without_rows_nothing_is_called(monkeypatch):
    monkeypatch.setattr(op, "block_product", None)
    w13, w2 = made(2 * FFN, HIDDEN), made(HIDDEN, FFN)
    x = torch.randn(3, HIDDEN)
    out = torch.full_like(x, 7)
    none = torch.empty(0, dtype=torch.int64)
    assert op.block_scaled_ffn(x, w13, w2, [0] * 4, out, none) is out and bool((out == 7).all())
    assert op.block_scaled_ffn(x[:0], w13, w2, [0] * 4).shape == (0, HIDDEN)


def test_matrices_filled_part_by_part_equal_those_rounded_at_once():
    rounded = made(384, HIDDEN)
    held = empty_weights(LAYOUT, 4, 384, HIDDEN, torch.device("cpu"), 384)
    for expert in range(4):
        codes, scale = parts_of(rounded, expert)
        of_rows = scale.repeat_interleave(BLOCK, 0)
        for first, end in ((0, 7), (7, 200), (200, 256), (256, 384)):
            part = codes[first:end].view(torch.uint8), of_rows[first:end]
            set_rows(held, expert, first, pack_floats(*part, LAYOUT))
    assert isinstance(held, BlockWeights)
    assert torch.equal(values(held), values(rounded))
    assert held.num_bytes == 4 * bytes_of_rows(held, 384) == 4 * (384 * HIDDEN + 3 * 2 * 4)


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        round_to(torch.full((1, BLOCK, BLOCK), torch.inf), LAYOUT)


def test_the_fake_refuses_what_the_library_refuses():
    placed, counts = placed_rows(torch.randn(200, HIDDEN), [100, 0, 99, 1])
    weights = made(384, HIDDEN)
    codes, scale, owner = placed.codes_PI, placed.scale_SGM, placed.owner_P

    def product(c=codes, s=scale, o=owner, dtype=torch.bfloat16, w=weights):
        return op.library_product((c, s), w, counts, o, 1, dtype)

    assert product().shape == (len(owner), 384)
    for words, change in {
        "results are bfloat16": {"dtype": torch.float32},
        "groups of rows are int32": {"o": owner.long()},
        "begins at a multiple of 128": {"o": owner.roll(1)},
        "behind those of a group": {"o": owner.index_fill(0, torch.tensor([3]), -1)},
        "rows lie row by row": {"c": codes.view(torch.uint8).T.contiguous().T.view(codes.dtype)},
        "column by column": {"s": scale.transpose(1, 2).contiguous().transpose(1, 2)},
        "scales of rows are float32": {"s": scale.double()},
        "per block of 128": {"w": BlockWeights(weights.codes_eOI, weights.scale_eHG[:, :2])},
    }.items():
        with pytest.raises(ContractError, match=words):
            product(**change)
