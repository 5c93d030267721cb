"""linear and grouped_ffn with bfloat16 weights and float32 rows, on every instruction set.

Run: python -m pytest tests/unit/ops/test_bfloat16_weights.py
"""

import pytest
import torch

from engine.ops import native
from engine.ops.grouped_ffn import grouped_ffn, grouped_ffn_reference
from engine.ops.linear import linear, linear_reference
from engine.ops.panels import from_panels, in_panels, to_panels
from tests.helpers.ops_cases import (
    BFLOAT16_ISAS_HERE,
    each_bfloat16_isa,
    needs_native,
    on_isa,
)

# Odd depths, outputs past the last whole panel, and pieces that have several panels side by side.
SHAPES = [(64, 96), (50, 21), (17, 130), (1, 1), (301, 16), (40, 600), (17, 2100)]
ROWS = [1, 2, 6, 7, 12, 13, 17, 33, 43, 48, 49, 200]
COUNTS = [[1, 2, 3], [0, 5, 0], [6, 7, 4], [16, 17, 33], [48, 49, 0], [200, 0, 3]]

needs_products = pytest.mark.skipif(
    "avx512_bf16" not in BFLOAT16_ISAS_HERE, reason="the processor lacks AVX512-BF16"
)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """What the instruction set in force makes of rows."""
    return x.bfloat16().float() if native.has_bfloat16_products() else x


def experts(dim: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w13 = torch.randn(3, 2 * width, dim, generator=generator) / dim**0.5
    w2 = torch.randn(3, dim, width, generator=generator) / width**0.5
    return w13.bfloat16(), w2.bfloat16()


def experts_by_hand(x, w13, w2, counts):
    """The FFN in float64, with rows and hidden rows rounded as the instruction set does."""
    parts, start = [], 0
    for expert, count in enumerate(counts):
        rows = rounded(x[start : start + count]).double()
        gate, up = (rows @ w13[expert].double().T).chunk(2, dim=-1)
        hidden = rounded((torch.nn.functional.silu(gate) * up).float()).double()
        parts.append((hidden @ w2[expert].double().T).float())
        start += count
    return torch.cat(parts)


@each_bfloat16_isa
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("depth", "outputs"), SHAPES)
def test_a_product_is_that_of_the_widened_weights_in_either_layout(isa, depth, outputs, rows):
    x, bias = torch.randn(rows, depth), torch.randn(outputs)
    weight = torch.randn(outputs, depth).bfloat16()
    with on_isa(isa):
        got, without = linear(x, weight, bias), linear(x, weight)
        expected = linear_reference(rounded(x), weight.float(), bias)
        if not native.has_bfloat16_products():
            assert torch.equal(got, linear(x, weight.float(), bias))
        assert to_panels(weight)
        assert torch.equal(linear(x, weight, bias), got)
        assert torch.equal(linear(x, weight), without)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@each_bfloat16_isa
@pytest.mark.parametrize(
    ("dim", "width"), [(64, 96), (50, 21), (17, 130), (1, 1), (128, 16), (1040, 530)]
)
@pytest.mark.parametrize("counts", COUNTS)
def test_experts_are_those_of_the_widened_weights_in_either_layout(isa, dim, width, counts):
    w13, w2 = experts(dim, width)
    x = torch.randn(sum(counts), dim)
    with on_isa(isa):
        got = grouped_ffn(x, w13, w2, counts)
        if native.has_bfloat16_products():
            # A hidden value near the middle of two may round to either: half a step of it.
            torch.testing.assert_close(
                got, experts_by_hand(x, w13, w2, counts), rtol=1e-2, atol=2e-3
            )
        else:
            assert torch.equal(got, grouped_ffn(x, w13.float(), w2.float(), counts))
        to_panels(w13, stacked=2)
        to_panels(w2)
        assert torch.equal(grouped_ffn(x, w13, w2, counts), got)


@each_bfloat16_isa
@pytest.mark.parametrize("panels", [False, True])
@pytest.mark.parametrize(("depth", "outputs"), [(77, 101), (64, 600)])
def test_a_row_gives_the_same_bits_whatever_else_is_in_the_batch(isa, panels, depth, outputs):
    x, weight = torch.randn(130, depth), torch.randn(outputs, depth).bfloat16()
    with on_isa(isa):
        if panels:
            to_panels(weight)
        whole = linear(x, weight)
        for size in (1, 3, 8, 16, 40, 100):
            parts = [linear(x[i : i + size], weight) for i in range(0, 130, size)]
            assert torch.equal(torch.cat(parts), whole), size


@each_bfloat16_isa
@pytest.mark.parametrize("panels", [False, True])
def test_a_row_of_an_expert_gives_the_same_bits_whatever_else_is_in_the_batch(isa, panels):
    w13, w2 = experts(33, 117)
    counts = [1, 61, 9]
    x = torch.randn(sum(counts), 33)
    with on_isa(isa):
        if panels:
            to_panels(w13, stacked=2)
            to_panels(w2)
        whole = grouped_ffn(x, w13, w2, counts)
        row = 0
        for expert, count in enumerate(counts):
            for at in (row, row + count // 2, row + count - 1):
                alone = [int(e == expert) for e in range(3)]
                assert torch.equal(whole[at : at + 1], grouped_ffn(x[at : at + 1], w13, w2, alone))
            row += count


@each_bfloat16_isa
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_does_not_change_a_bit(isa, threads):
    w13, w2 = experts(100, 300)
    counts = [1, 150, 20]
    x = torch.randn(sum(counts), 100)
    before = torch.get_num_threads()
    with on_isa(isa):
        expected = grouped_ffn(x, w13, w2, counts)
        torch.set_num_threads(threads)
        try:
            got = grouped_ffn(x, w13, w2, counts)
        finally:
            torch.set_num_threads(before)
    assert torch.equal(got, expected)


@each_bfloat16_isa
def test_more_rows_than_one_wave_holds_match_the_widened_weights(isa):
    w13, w2 = experts(512, 128)
    counts = [300, 9000, 10]
    x = torch.randn(sum(counts), 512)
    with on_isa(isa):
        got = grouped_ffn(x, w13, w2, counts)
        alone = grouped_ffn(x[-1:], w13, w2, [0, 0, 1])
    torch.testing.assert_close(
        got, grouped_ffn_reference(x, w13.float(), w2.float(), counts), rtol=2e-2, atol=2e-2
    )
    assert torch.equal(got[-1:], alone)


@each_bfloat16_isa
def test_strided_weights_rows_at_an_index_and_no_rows(isa):
    x = torch.randn(3, 5, 80)[..., 7:47]
    weight = torch.randn(30, 65).bfloat16()[:, 11:51]  # rows at odd places
    w13, w2 = experts(50, 21)
    counts = [7, 60, 13]
    rows, index = torch.randn(80, 50), torch.randperm(80)
    with on_isa(isa):
        got = linear(x, weight)
        torch.testing.assert_close(
            got, linear_reference(rounded(x), weight.float()), rtol=1e-4, atol=1e-4
        )
        assert linear(x[:0], weight).shape == (0, 5, 30)
        placed = grouped_ffn(rows, w13, w2, counts, index_R=index)
        assert torch.equal(placed[index], grouped_ffn(rows[index], w13, w2, counts))


@needs_products
def test_rows_are_rounded_to_the_nearest_even_bfloat16():
    # 1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between 1 + 2^-7 and 1 + 2^-6.
    x = torch.tensor([[1 + 2.0**-8, 0.0], [1 + 3 * 2.0**-8, 0.0], [1 + 2.0**-8 + 2.0**-20, 0.0]])
    weight = torch.tensor([[1.0, 1.0]]).bfloat16()
    with on_isa("avx512_bf16"):
        got = linear(x, weight)
    assert got.flatten().tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7]


@needs_products
def test_float32_weights_are_not_rounded_where_bfloat16_products_run():
    x, weight = torch.randn(9, 50), torch.randn(40, 50)
    with on_isa("avx512"):
        assert not native.has_bfloat16_products()
        expected = linear(x, weight)
    with on_isa("avx512_bf16"):
        assert native.has_bfloat16_products()
        assert torch.equal(linear(x, weight), expected)


@needs_native
def test_pairs_of_columns_lie_together_and_the_last_column_behind_them():
    weight = torch.arange(37 * 5, dtype=torch.float32).view(37, 5).bfloat16()
    before = weight.clone()
    parts = []
    for panel in (before[:16], before[16:32]):
        parts += [panel[:, 0:2].flatten(), panel[:, 2:4].flatten(), panel[:, 4]]
    assert to_panels(weight) and in_panels(weight)
    assert torch.equal(weight.flatten(), torch.cat([*parts, before[32:].flatten()]))


@needs_native
@pytest.mark.parametrize("depth", [1, 2, 33])
def test_weights_come_back_from_panels(depth):
    weight = torch.randn(2, 2 * 21, depth).bfloat16()
    before = weight.clone()
    assert torch.equal(from_panels(weight, 1, stacked=2), before[1])
    to_panels(weight, stacked=2)
    assert torch.equal(from_panels(weight, 1, stacked=2), before[1])


@needs_native
def test_weights_of_two_dtypes_go_to_torch():
    w13, w2 = experts(8, 16)
    x = torch.randn(3, 8)
    assert native.serves_weights(w13, w2) and not native.serves_weights(w13, w2.float())
    assert not native.serves_weights(w13.half()) and not native.serves(w13)
    got = grouped_ffn(x, w13, w2.float(), [1, 1, 1])
    assert torch.equal(got, grouped_ffn_reference(x, w13, w2, [1, 1, 1]))


def test_the_plain_form_widens_the_weights():
    w13, w2 = experts(8, 5)
    x, bias = torch.randn(3, 8), torch.randn(10)
    got = linear_reference(x, w13[0], bias)
    assert got.dtype is torch.float32
    assert torch.equal(got, linear_reference(x, w13[0].float(), bias))
    got = grouped_ffn_reference(x, w13, w2, [1, 1, 1])
    assert torch.equal(got, grouped_ffn_reference(x, w13.float(), w2.float(), [1, 1, 1]))
