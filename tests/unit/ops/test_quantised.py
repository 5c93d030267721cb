"""Quantised expert weights: the layout, the error of rounding, and their products.

Run: python -m pytest tests/unit/ops/test_quantised.py
"""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.ops.grouped_ffn import grouped_ffn, grouped_ffn_reference
from engine.ops.quantised import (
    QuantisedWeights,
    dequantise,
    grouped_ffn_quantised,
    grouped_ffn_quantised_reference,
    num_bytes,
    pack,
    quantise,
)
from tests.helpers.ops_cases import ISAS_HERE, each_isa, needs_native, on_isa

SIZES = [(64, 96), (50, 21), (17, 130), (1, 1), (33, 40), (128, 16)]


def weights(experts: int, outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(experts, outputs, inputs, generator=generator) / inputs**0.5


def random_packed(experts: int, outputs: int, inputs: int, bits: int, group: int, zeros: bool):
    """Integers with scales and, where asked, zero points that no rounding made."""
    generator = torch.Generator().manual_seed(bits + group)
    groups = -(-inputs // group)
    q_eOI = torch.randint(0, 2**bits, (experts, outputs, inputs), generator=generator)
    scale_eOG = torch.randn(experts, outputs, groups, generator=generator) / 2**bits / inputs**0.5
    zero_eOG = torch.rand(experts, outputs, groups, generator=generator) * 2**bits
    return q_eOI, scale_eOG, zero_eOG if zeros else None


def test_eight_columns_of_an_output_are_a_word_and_sixteen_outputs_lie_side_by_side():
    q_eOI = torch.zeros(1, 17, 9, dtype=torch.uint8)
    q_eOI[0, 0] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9])
    q_eOI[0, 1, 0], q_eOI[0, 16, 8] = 10, 11
    scale_eOG = torch.arange(34.0).view(1, 17, 2)  # 9 columns: a group of 8 and a shorter one
    got = pack(q_eOI, scale_eOG, None, bits=4, group=8)
    assert got.packed_ePCN.shape == (1, 2, 2, 16) and got.packed_ePCN.dtype is torch.int32
    words = got.packed_ePCN[0].tolist()
    assert words[0][0][0] & 0xFFFFFFFF == 0x87654321 and words[0][1][0] == 9
    assert words[0][0][1] == 10 and words[1][1][0] == 11
    assert sum(map(sum, words[0])) == words[0][0][0] + 9 + 10
    assert got.scale_ePGN[0, 0, 1].tolist() == [2.0 * n + 1 for n in range(16)]
    assert got.scale_ePGN[0, 1, 0].tolist() == [32.0] + [0.0] * 15


def test_four_columns_of_eight_bits_are_a_word():
    q_eOI = torch.tensor([[[1, 2, 3, 255, 5]]])
    got = pack(q_eOI, torch.ones(1, 1, 1), None, bits=8, group=5)
    assert [word[0] & 0xFFFFFFFF for word in got.packed_ePCN[0, 0].tolist()] == [0xFF030201, 5]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [8, 32, 1000])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_dequantised_weights_are_the_integers_less_zero_times_scale(
    bits, group, zeros, outputs, inputs
):
    q, scale, zero = random_packed(2, outputs, inputs, bits, min(group, inputs), zeros)
    got = pack(q, scale, zero, bits, group)
    by_column = torch.arange(inputs) // min(group, inputs)
    middle = 2 ** (bits - 1) if zero is None else zero[:, :, by_column]
    expected = (q - middle) * scale[:, :, by_column]
    assert torch.equal(dequantise(got), expected)
    assert torch.equal(dequantise(got, 1), expected[1])
    assert torch.equal(dequantise(got, 1, torch.bfloat16), expected[1].bfloat16())


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize(("bits", "steps"), [(4, 7), (8, 127)])
def test_rounding_errs_by_little_more_than_half_a_step(outputs, inputs, bits, steps):
    before = weights(2, outputs, inputs)
    got = dequantise(quantise(before, bits, 32))
    # A candidate of int4 may clip: at most the one step between 8 and 9 and half a step more.
    bound = 0.5 / steps if bits == 8 else 2.0 / steps
    for error, values in zip((got - before).split(32, dim=2), before.split(32, dim=2), strict=True):
        largest = values.abs().amax(dim=2, keepdim=True)
        assert (error.abs() <= largest * bound * 1.001).all()


def test_int4_errs_less_than_rounding_to_the_largest_weight():
    before = weights(1, 256, 256)
    groups = before.view(1, 256, 8, 32)
    scale = groups.abs().amax(dim=3, keepdim=True) / 7
    plain = ((groups / scale).round() * scale).view_as(before)
    error = (dequantise(quantise(before, 4)) - before).norm()
    assert error < 0.87 * (plain - before).norm()
    assert error < 0.09 * before.norm()


def test_weights_that_lie_on_a_grid_come_back():
    # In every group the largest is -8 steps, so that one candidate is the grid itself.
    q = torch.randint(-8, 8, (2, 20, 64), generator=torch.Generator().manual_seed(0))
    q[..., ::32] = -8
    for sign in (1, -1):
        before = q * 0.03125 * sign
        torch.testing.assert_close(dequantise(quantise(before, 4)), before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_zero_stay_zero(bits):
    before = weights(1, 16, 64)
    before[0, 3, :32] = 0
    got = dequantise(quantise(before, bits))
    assert (got[0, 3, :32] == 0).all() and got.isfinite().all()


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 32), (8, 1000), (4, 8)])
def test_the_bytes_are_known_beforehand(bits, group):
    for experts in (0, 2):
        got = quantise(weights(experts, 50, 21), bits, group)
        assert got.num_bytes == num_bytes(experts, 50, 21, bits, group)
        assert got.num_experts == experts and dequantise(got).shape == (experts, 50, 21)
    assert num_bytes(1, 512, 512, 4) == 512 * 512 * 5 // 8  # 4 bits and a scale per 32 weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_other_dtypes_are_rounded_from_their_values(dtype):
    before = weights(1, 32, 64).to(dtype)
    assert torch.equal(dequantise(quantise(before, 4)), dequantise(quantise(before.float(), 4)))


def test_bits_groups_shapes_and_values_that_there_are_none_of_are_refused():
    before = weights(1, 8, 40)
    with pytest.raises(ValueError, match="bits=3: quantised weights have 4 or 8"):
        quantise(before, 3)
    for group in (12, 0, -8):
        with pytest.raises(ValueError, match=f"group={group}: must be a multiple of 8"):
            quantise(before, 4, group)
    with pytest.raises(ValueError, match=r"scale_eOG: shape \(1, 8, 1\); .* need \(1, 8, 2\)"):
        pack(torch.zeros(1, 8, 40, dtype=torch.uint8), torch.ones(1, 8, 1), None, 4, 32)
    for value in (torch.nan, torch.inf):
        before[0, 3, 5] = value
        with pytest.raises(ValueError, match="weights_eOI: has values that are not finite"):
            quantise(before, 4)


def quantised(experts: int, dim: int, width: int, bits: int) -> tuple[QuantisedWeights, ...]:
    w13, w2 = weights(experts, 2 * width, dim), weights(experts, dim, width, seed=1)
    return quantise(w13, bits), quantise(w2, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[1, 1, 1], [0, 5, 0], [0, 0, 0]])
def test_the_reference_is_the_product_with_dequantised_weights(bits, dtype, counts):
    w13, w2 = quantised(3, 50, 21, bits)
    x = torch.randn(sum(counts), 50).to(dtype)
    expected = grouped_ffn_reference(
        x, dequantise(w13, dtype=dtype), dequantise(w2, dtype=dtype), counts
    )
    # Close and not equal: BLAS computes by where in memory a matrix begins.
    got = grouped_ffn_quantised_reference(x, w13, w2, counts)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("run", [grouped_ffn_quantised, grouped_ffn_quantised_reference])
def test_results_go_where_they_are_asked_to_and_where_the_rows_lie(run):
    w13, w2 = quantised(2, 8, 4, 4)
    x, buffer = torch.randn(3, 8), torch.full((5, 8), 9.0)
    index = torch.tensor([2, 0, 1])
    got = run(x, w13, w2, [1, 2], buffer[:3], index)
    assert got.data_ptr() == buffer.data_ptr() and (buffer[3:] == 9.0).all()
    expected = grouped_ffn_quantised_reference(x[index], w13, w2, [1, 2])
    torch.testing.assert_close(got[index], expected)


def packed_experts(dim: int, width: int, bits: int, zeros: bool) -> tuple[QuantisedWeights, ...]:
    """Three experts' w13 and w2, of integers and scales that no rounding made."""
    sizes = [(2 * width, dim), (dim, width)]
    return tuple(
        pack(*random_packed(3, outputs, inputs, bits, min(32, inputs), zeros), bits, 32)
        for outputs, inputs in sizes
    )


@each_isa
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (8, False), (8, True)])
@pytest.mark.parametrize(("dim", "width"), [(64, 96), (50, 21), (17, 130), (1, 1), (128, 16)])
@pytest.mark.parametrize(
    "counts", [[1, 2, 8], [0, 5, 0], [9, 17, 33], [48, 49, 0], [200, 0, 3], [0, 0, 0]]
)
def test_ragged_counts_match_the_reference(isa, bits, zeros, dim, width, counts):
    w13, w2 = packed_experts(dim, width, bits, zeros)
    x = torch.randn(sum(counts), dim)
    with on_isa(isa):
        got = grouped_ffn_quantised(x, w13, w2, counts)
    expected = grouped_ffn_quantised_reference(x, w13, w2, counts)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=5e-6)


@each_isa
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
# Of 600 by 544 a piece of work has panels enough for several to be read side by side.
@pytest.mark.parametrize(("dim", "width"), [(64, 96), (50, 21), (600, 544)])
@pytest.mark.parametrize("counts", [[1, 2, 3], [5, 7, 8], [11, 16, 100], [17, 24, 31], [33, 4, 1]])
def test_results_are_the_bits_of_the_product_with_dequantised_weights(
    isa, bits, zeros, counts, dim, width
):
    w13, w2 = packed_experts(dim, width, bits, zeros)
    x = torch.randn(sum(counts), dim)
    with on_isa(isa):
        expected = grouped_ffn(x, dequantise(w13), dequantise(w2), counts)
        assert torch.equal(grouped_ffn_quantised(x, w13, w2, counts), expected)


@needs_native
@pytest.mark.parametrize(("dim", "width"), [(33, 20), (40, 32)])
@given(counts=st.lists(st.integers(0, 70), min_size=3, max_size=3), seed=st.integers(0, 9))
def test_a_row_gives_the_same_bits_whatever_else_is_in_the_batch(dim, width, counts, seed):
    w13, w2 = packed_experts(dim, width, 4, False)
    x = torch.randn(sum(counts), dim, generator=torch.Generator().manual_seed(seed))
    with on_isa(ISAS_HERE[0]):
        whole = grouped_ffn_quantised(x, w13, w2, counts)
        row = 0
        for expert, count in enumerate(counts):
            for at in {row, row + count - 1} if count else ():
                alone = [int(e == expert) for e in range(3)]
                got = grouped_ffn_quantised(x[at : at + 1], w13, w2, alone)
                assert torch.equal(whole[at : at + 1], got)
            row += count


@each_isa
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_does_not_change_a_bit(isa, threads):
    w13, w2 = packed_experts(100, 300, 4, False)
    counts = [1, 150, 20]
    x = torch.randn(sum(counts), 100)
    before = torch.get_num_threads()
    with on_isa(isa):
        expected = grouped_ffn_quantised(x, w13, w2, counts)
        torch.set_num_threads(threads)
        try:
            got = grouped_ffn_quantised(x, w13, w2, counts)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(got, expected)


@pytest.mark.skipif(
    not {"avx2", "avx512"} <= set(ISAS_HERE), reason="the processor lacks AVX2 or AVX-512"
)
@pytest.mark.parametrize("bits", [4, 8])
def test_avx2_and_avx512_give_the_same_bits(bits):
    w13, w2 = packed_experts(50, 32, bits, True)
    x = torch.randn(37, 50)
    with on_isa("avx512"):
        wide = grouped_ffn_quantised(x, w13, w2, [30, 0, 7])
    with on_isa("avx2"):
        assert torch.equal(wide, grouped_ffn_quantised(x, w13, w2, [30, 0, 7]))


@each_isa
@pytest.mark.parametrize("counts", [[1, 1, 0], [7, 60, 130]])
def test_rows_that_lie_anywhere_give_the_same_bits_in_their_places(isa, counts):
    w13, w2 = packed_experts(50, 21, 4, False)
    x = torch.randn(sum(counts), 50)
    index = torch.randperm(sum(counts))
    with on_isa(isa):
        expected = grouped_ffn_quantised(x[index], w13, w2, counts)
        got = grouped_ffn_quantised(x, w13, w2, counts, index_R=index)
    assert torch.equal(got[index], expected)


@needs_native
def test_matrices_and_counts_that_do_not_fit_are_refused():
    w13, w2 = packed_experts(40, 16, 4, False)
    with pytest.raises(RuntimeError, match="counts sum to 3 of 4 rows"):
        grouped_ffn_quantised(torch.randn(4, 40), w13, w2, [1, 2, 0])
    with pytest.raises(RuntimeError, match="grouped_ffn_quantised: x"):
        grouped_ffn_quantised(torch.randn(4, 40), w13, w13, [4, 0, 0])
    with pytest.raises(RuntimeError, match="grouped_ffn_quantised: words of w2"):
        short = dataclasses.replace(w2, packed_ePCN=w2.packed_ePCN[:, :, :-1].contiguous())
        grouped_ffn_quantised(torch.randn(4, 40), w13, short, [4, 0, 0])
