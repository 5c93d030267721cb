"""grouped_low_bit in Triton, and the FFN on it, against the plain torch forms.

On a CUDA device, else in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch

from engine.moe.expert_form import ExpertForm
from engine.ops import triton_support
from engine.ops.grouped_low_bit import (
    Between,
    grouped_ffn_low_bit,
    grouped_ffn_low_bit_reference,
    grouped_low_bit_reference,
    low_bit_ffn,
    row_tiles,
)
from engine.ops.low_bit_floats import FloatWeights, pack_fp8, pack_mxfp4
from engine.ops.quantised import QuantisedWeights, grouped_ffn_quantised, pack
from tests.helpers.triton_cases import DEVICE, DTYPES, kernel

Weights = QuantisedWeights | FloatWeights
# Of the largest value: the order of sums, and in float16 weights and sums rounded once.
BOUNDS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
COUNTS = [3, 0, 17, 1]  # an expert without rows, one of two tiles with a tail

pytestmark = kernel


def on_device(weights: Weights) -> Weights:
    return dataclasses.replace(
        weights,
        packed_ePCN=weights.packed_ePCN.to(DEVICE),
        scale_ePGN=weights.scale_ePGN.to(DEVICE),
        zero_ePGN=None if weights.zero_ePGN is None else weights.zero_ePGN.to(DEVICE),
    )


def integers(bits: int, group: int, zeros: bool, outputs: int, inputs: int) -> Weights:
    groups = -(-inputs // min(group, inputs))
    q_eOI = torch.randint(0, 2**bits, (4, outputs, inputs))
    scale_eOG = (0.5 + torch.rand(4, outputs, groups)) / 2**bits
    zero_eOG = torch.rand(4, outputs, groups) * 2**bits if zeros else None
    return pack(q_eOI, scale_eOG, zero_eOG, bits, group)


def fp8(block: tuple[int, int], outputs: int, inputs: int) -> Weights:
    scale_eOG = 0.5 + torch.rand(4, -(-outputs // block[0]), -(-inputs // block[1]))
    return pack_fp8(torch.randn(4, outputs, inputs).to(torch.float8_e4m3fn), scale_eOG, block)


def mxfp4(outputs: int, inputs: int) -> Weights:
    bytes_eOB = torch.randint(0, 256, (4, outputs, inputs // 2), dtype=torch.uint8)
    return pack_mxfp4(
        bytes_eOB, torch.randint(124, 129, (4, outputs, inputs // 32), dtype=torch.uint8)
    )


MAKE: dict[str, Callable[[int, int], Weights]] = {
    "int4": lambda outputs, inputs: integers(4, 32, True, outputs, inputs),
    "mxfp4": mxfp4,
    "fp8": lambda outputs, inputs: fp8((128, 128), outputs, inputs),
}


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.isfinite().all()
    error = (got.cpu().float() - expected.cpu().float()).abs().max()
    assert error <= BOUNDS[got.dtype] * expected.abs().max().float().cpu()


def check_product(weights: Weights, dtype: torch.dtype, counts: list[int] = COUNTS) -> None:
    from engine.ops.gpu.grouped_low_bit import grouped_low_bit_triton

    tiles, height = row_tiles(counts)
    x_RI = torch.randn(sum(counts), weights.inputs).to(dtype).to(DEVICE)
    given = (on_device(weights), tiles.to(DEVICE), height)
    outs = [torch.full((len(x_RI), weights.outputs), 7.0, device=DEVICE).to(dtype) for _ in "ab"]
    got = grouped_low_bit_triton(x_RI, *given, outs[0])
    assert_near(got, grouped_low_bit_reference(x_RI, *given, outs[1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64), (4, 24), (8, 1000)])
def test_products_with_integers_match_the_reference(bits, group, zeros, dtype):
    # Groups of a part of a turn, of a whole one, that divide nothing, and of a whole row; outputs
    # and columns that fill neither panels nor words nor tiles.
    check_product(integers(bits, group, zeros, 75, 101), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_with_mxfp4_match_the_reference(dtype):
    check_product(mxfp4(75, 96), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(128, 128), (1, 1000), (32, 64), (20, 12), (1000, 1000)])
def test_products_with_fp8_match_the_reference(block, dtype):
    check_product(fp8(block, 139, 150), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int4", "mxfp4", "fp8"])
def test_the_bias_of_each_expert_is_added_to_its_rows_alone(kind, dtype):
    from engine.ops.gpu.grouped_low_bit import grouped_low_bit_triton

    weights, (tiles, height) = on_device(MAKE[kind](75, 96)), row_tiles(COUNTS)
    given = (weights, tiles.to(DEVICE), height)
    x_RI = torch.zeros(sum(COUNTS), 96, dtype=dtype, device=DEVICE)
    bias_eO = torch.randn(4, 75).to(dtype).to(DEVICE)
    outs = [torch.full((len(x_RI), 75), 7.0, device=DEVICE).to(dtype) for _ in "ab"]
    got = grouped_low_bit_triton(x_RI, *given, outs[0], bias_eO=bias_eO)
    experts = torch.repeat_interleave(torch.tensor(COUNTS)).to(DEVICE)
    assert torch.equal(got, bias_eO[experts])
    x_RI = torch.randn(sum(COUNTS), 96).to(dtype).to(DEVICE)
    got = grouped_low_bit_triton(x_RI, *given, outs[0], bias_eO=bias_eO)
    assert_near(got, grouped_low_bit_reference(x_RI, *given, outs[1], bias_eO=bias_eO))


@pytest.mark.parametrize(
    "form",
    [
        ExpertForm(activation="gpt_oss", bias=True, limit=0.7),
        ExpertForm(activation="relu2", gated=False),
        ExpertForm(gated=True, bias=True),
    ],
    ids=["gpt-oss", "relu2", "biases"],
)
def test_the_ffn_of_every_form_is_the_references(form):
    inner = 2 * 32 if form.gated else 32
    w13, w2 = on_device(mxfp4(inner, 64)), on_device(mxfp4(64, 32))
    biases = (torch.randn(4, inner).to(DEVICE), torch.randn(4, 64).to(DEVICE))
    between = Between(form.rule, *(biases if form.bias else (None, None)))
    x_RD = torch.randn(30, 64, device=DEVICE) / 8
    index_R = torch.randperm(30)[: sum(COUNTS)].to(DEVICE)
    given = (x_RD, w13, w2, COUNTS)
    outs = [torch.full_like(x_RD, 7.0) for _ in "ab"]
    got = grouped_ffn_low_bit(*given, outs[0], index_R, between)
    assert_near(got, grouped_ffn_low_bit_reference(*given, outs[1], index_R, between))


def test_every_code_of_mxfp4_and_fp8_is_its_value():
    from engine.ops.gpu.grouped_low_bit import grouped_low_bit_triton

    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    eight = pack_fp8(codes.view(1, 1, -1), torch.ones(1, 1, 1), (1, 1000))
    pairs = (torch.arange(16) | torch.arange(16) << 4).to(torch.uint8)
    four = pack_mxfp4(pairs.view(1, 1, -1), torch.full((1, 1, 1), 128, dtype=torch.uint8))
    small = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    expected = [value for each in [*small, *(-one for one in small)] for value in [2.0 * each] * 2]
    for weights, values in (
        (eight, codes.view(torch.float8_e4m3fn).float()),
        (four, torch.tensor(expected)),
    ):
        tiles, height = row_tiles([weights.inputs])
        out_RO = torch.empty(weights.inputs, 1, device=DEVICE)
        x_RI = torch.eye(weights.inputs, device=DEVICE)
        grouped_low_bit_triton(x_RI, on_device(weights), tiles.to(DEVICE), height, out_RO)
        assert torch.equal(out_RO[:, 0].cpu(), values)


def test_more_rows_than_two_small_tiles_take_large_ones():
    assert row_tiles([32])[1] == 16
    check_product(integers(4, 32, False, 40, 64), torch.float32, [0, 70, 2, 0])


def test_tiles_are_the_expert_the_first_row_and_the_end_of_its_rows():
    tiles, height = row_tiles([3, 0, 17, 16])
    assert height == 16
    assert tiles.tolist() == [[0, 0, 3], [2, 3, 20], [2, 19, 20], [3, 20, 36]]
    assert row_tiles([0, 65])[0].tolist() == [[1, 0, 65], [1, 64, 65]]
    assert row_tiles([])[0].shape == row_tiles([0, 0])[0].shape == (0, 3)


@pytest.mark.parametrize("kind", ["int4", "mxfp4", "fp8"])
def test_the_ffn_reads_and_writes_rows_where_the_index_says_and_no_others(kind):
    make = MAKE[kind]
    w13, w2 = on_device(make(64, 64)), on_device(make(64, 32))
    x_RD = torch.randn(30, 64, device=DEVICE) / 8
    rows = sum(COUNTS)
    for index in (None, torch.randperm(30)[:rows].to(DEVICE)):
        given = (x_RD if index is not None else x_RD[:rows], w13, w2, COUNTS)
        outs = [torch.full_like(given[0], 7.0) for _ in "ab"]
        got = grouped_ffn_low_bit(*given, outs[0], index)
        assert got is outs[0]
        expected = grouped_ffn_low_bit_reference(*given, outs[1], index)
        assert_near(got, expected)
        if index is not None:
            assert int((got == 7.0).all(dim=1).sum()) == 30 - rows


def test_ops_take_the_kernel_where_triton_serves(monkeypatch):
    monkeypatch.setattr(triton_support, "serves", lambda tensor: True)
    called = []
    from engine.ops.gpu import grouped_low_bit

    plain = grouped_low_bit.grouped_low_bit_triton
    monkeypatch.setattr(
        grouped_low_bit,
        "grouped_low_bit_triton",
        lambda *args, **options: called.append(args[1]) or plain(*args, **options),
    )
    x_RD = torch.randn(4, 64, device=DEVICE).half() / 64  # products of MXFP4 fit in float16
    make_int4 = functools.partial(integers, 4, 32, False)
    ops: list[tuple[Callable[..., torch.Tensor], Callable[[int, int], Weights]]] = [
        (grouped_ffn_quantised, make_int4),
        (low_bit_ffn, mxfp4),
    ]
    for op, make in ops:
        w13, w2 = make(64, 64), make(64, 32)
        called.clear()
        given = (x_RD, on_device(w13), on_device(w2), [4, 0, 0, 0])
        assert_near(op(*given), grouped_ffn_low_bit_reference(*given))
        assert len(called) == 2, "products"
        assert torch.equal(op(*given[:3], [0] * 4, x_RD.clone()), x_RD)
        assert len(called) == 2, "no rows, no launch"
