"""Weights in panels: where every weight lies afterwards, and that no product changes by a bit.

Run: python -m pytest tests/unit/ops/test_panels.py
"""

import pytest
import torch

from engine.ops import native
from engine.ops.grouped_ffn import grouped_ffn
from engine.ops.linear import linear
from engine.ops.panels import in_panels, to_panels
from tests.helpers.ops_cases import each_isa, needs_native, on_isa


@needs_native
def test_sixteen_rows_lie_transposed_together_and_the_rest_as_it_was():
    weight = torch.arange(37 * 3, dtype=torch.float32).view(37, 3)
    expected = torch.cat(
        [weight[:16].T.flatten(), weight[16:32].T.flatten(), weight[32:].flatten()]
    )
    place = weight.data_ptr()
    assert to_panels(weight) and in_panels(weight)
    assert weight.data_ptr() == place, "in place"
    assert torch.equal(weight.flatten(), expected)
    assert to_panels(weight) and torch.equal(weight.flatten(), expected), "once is enough"


@needs_native
def test_stacked_matrices_have_panels_of_their_own():
    whole = torch.randn(2, 2 * 20, 5)
    parts = [whole[0, :20].clone(), whole[0, 20:].clone(), whole[1, :20].clone()]
    to_panels(whole, stacked=2)
    for part, found in zip(parts, (whole[0, :20], whole[0, 20:], whole[1, :20]), strict=True):
        to_panels(part)
        assert torch.equal(part, found)


@each_isa
# From 600 outputs on a piece of work has panels enough for several to be read side by side.
@pytest.mark.parametrize(
    ("depth", "outputs"),
    [(64, 96), (50, 21), (17, 130), (1, 1), (300, 16), (40, 600), (17, 4100)],
)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 12, 13, 16, 17, 29, 33, 43, 48, 49, 200])
def test_a_product_is_the_same_bits_in_either_layout(isa, depth, outputs, rows):
    weight, bias = torch.randn(outputs, depth), torch.randn(outputs)
    x = torch.randn(rows, depth)
    with on_isa(isa):
        expected, without = linear(x, weight, bias), linear(x, weight)
        to_panels(weight)
        assert torch.equal(linear(x, weight, bias), expected)
        assert torch.equal(linear(x, weight), without)


@each_isa
@pytest.mark.parametrize(
    ("dim", "width"), [(64, 96), (50, 21), (17, 130), (1, 1), (128, 16), (1040, 530)]
)
@pytest.mark.parametrize(
    "counts",
    [[1, 2, 3], [0, 5, 0], [6, 7, 4], [16, 17, 33], [48, 49, 0], [200, 0, 3], [12, 13, 25]],
)
def test_the_experts_are_the_same_bits_in_either_layout(isa, dim, width, counts):
    w13, w2 = torch.randn(3, 2 * width, dim), torch.randn(3, dim, width)
    x = torch.randn(sum(counts), dim)
    with on_isa(isa):
        expected = grouped_ffn(x, w13, w2, counts)
        to_panels(w13, stacked=2)
        to_panels(w2)
        assert torch.equal(grouped_ffn(x, w13, w2, counts), expected)


@needs_native
def test_one_weight_in_panels_without_the_other_is_refused():
    w13, w2 = torch.randn(1, 32, 8), torch.randn(1, 8, 16)
    to_panels(w13)
    with pytest.raises(AssertionError, match="both weights in panels, or none"):
        grouped_ffn(torch.randn(1, 8), w13, w2, [1])


def test_where_the_kernels_do_not_run_weights_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    weight = torch.randn(32, 8)
    before = weight.clone()
    assert not to_panels(weight) and not in_panels(weight)
    assert torch.equal(weight, before)


def test_weights_in_other_types_or_not_contiguous_stay_as_they_are():
    for weight in (torch.randn(32, 8).half(), torch.randn(8, 32).T):
        before = weight.clone()
        assert not to_panels(weight) and torch.equal(weight, before)
