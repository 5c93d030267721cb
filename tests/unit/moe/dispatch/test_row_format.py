"""Wire rows: sizes, and what comes back. Run: pytest tests/unit/moe/dispatch/test_row_format.py"""

from __future__ import annotations

import pytest
import torch

from engine.config import DispatchConfig
from engine.moe.dispatch.row_format import RowFormat, RowFormats

FP8 = torch.float8_e4m3fn


def there_and_back(wire: RowFormat, x: torch.Tensor, index: torch.Tensor | None = None):
    rows = torch.zeros(x.shape[0], wire.row_bytes, dtype=torch.uint8)
    wire.pack(wire.encode(x), torch.arange(x.shape[0]), rows)
    out = x.new_empty(x.shape if index is None else (index.numel(), x.shape[1]))
    wire.unpack(rows, index, out)
    return out


@pytest.mark.parametrize(
    ("dtype", "payload", "extra", "row_bytes"),
    [
        (torch.float32, torch.float32, {"bitmap_bytes": 1}, 64 + 16),
        (torch.bfloat16, torch.bfloat16, {"bitmap_bytes": 2}, 32 + 16),
        (torch.float32, torch.bfloat16, {}, 32),
        (torch.float32, FP8, {}, 32),  # 16, a scale, padding
        (torch.float32, FP8, {"num_weights": 8, "bitmap_bytes": 1}, 64),  # 16 + 4 + 32 + 1
    ],
)
def test_a_wire_row_is_its_parts_padded_to_16_bytes(dtype, payload, extra, row_bytes):
    assert RowFormat(16, dtype, payload, **extra).row_bytes == row_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [16, 7])
def test_rows_in_their_own_dtype_come_back_bit_for_bit_in_any_order(dtype, width):
    wire = RowFormat(width, dtype, dtype, bitmap_bytes=1)
    x = torch.randn(5, width).to(dtype)
    x[2, 3] = float("nan")
    index = torch.tensor([4, 0, 0, 2])
    assert torch.equal(there_and_back(wire, x).nan_to_num(7.0), x.nan_to_num(7.0))
    assert torch.equal(there_and_back(wire, x, index).nan_to_num(7.0), x[index].nan_to_num(7.0))


def test_float8_keeps_each_element_to_a_sixteenth_and_small_ones_to_their_step():
    x = torch.randn(3000, 24) * torch.logspace(-20, 20, 3000)[:, None]
    got = there_and_back(RowFormat(24, torch.float32, FP8), x)
    scale = x.abs().amax(1, keepdim=True) / 448
    within = torch.maximum(x.abs() / 16, scale / 1024) * 1.001
    assert ((got - x).abs() <= within).all()
    assert got.abs().amax(1) == pytest.approx(x.abs().amax(1), rel=1e-6), "the largest is exact"


def test_a_row_of_zeros_comes_back_as_zeros_and_bad_rows_spoil_no_other():
    x = torch.randn(4, 24)
    x[1] = 0
    x[2, 5] = float("inf")
    x[3, 6] = float("nan")
    got = there_and_back(RowFormat(24, torch.float32, FP8), x)
    assert not got[1].any() and got[0].isfinite().all()
    assert not got[2].isfinite().all() and not got[3].isfinite().any()


def test_headers_do_not_touch_payloads():
    wire = RowFormat(7, torch.float32, FP8, num_weights=3, bitmap_bytes=2)
    x, weights = torch.randn(4, 7), torch.rand(4, 3)
    bits = torch.randint(0, 256, (4, 2), dtype=torch.uint8)
    rows = torch.full((4, wire.row_bytes), 255, dtype=torch.uint8)
    wire.pack(wire.encode(x), torch.tensor([3, 2, 1, 0]), rows)
    before = x.new_empty(4, 7)
    wire.unpack(rows, None, before)
    cells = torch.tensor([2, 0, 1, 3])
    wire.pack_header(cells, bits, weights, rows)
    after = x.new_empty(4, 7)
    wire.unpack(rows, None, after)
    assert torch.equal(before, after)
    assert torch.equal(wire.bits(rows), bits[cells])
    assert torch.equal(wire.weights(rows), weights[cells])


def test_rows_in_the_models_dtype_have_no_row_format():
    assert RowFormats.of(16, torch.bfloat16, DispatchConfig()).per_assignment() is None
    assert RowFormats.of(16, torch.bfloat16, DispatchConfig(dtype="bf16")).per_assignment() is None
    narrow = RowFormats.of(16, torch.float32, DispatchConfig(dtype="bf16"))
    assert (narrow.dispatch_bytes, narrow.combine_bytes) == (32, 64)
    rows = RowFormats.of(16, torch.float32, DispatchConfig(partial_sums=True))
    unique = rows.deduplicated(4, 1)
    assert (unique.num_weights, unique.bitmap_bytes, unique.row_bytes) == (4, 1, 96)
