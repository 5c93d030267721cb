"""The Triton kernels that move rows, against torch: bit for bit.

TRITON_INTERPRET=1 python -m pytest tests/gpu/test_rows_triton.py
"""

import pytest
import torch

from engine.moe.dispatch.row_format import RowFormat
from engine.ops import triton_support
from engine.ops.permute import pack_rows_reference, unpack_rows_reference
from tests.gpu.test_ops_triton import DEVICE, kernel

ALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8]


def rows_of(dtype: torch.dtype, num_rows: int, width: int) -> torch.Tensor:
    return (torch.randn(num_rows, width) * 50).to(dtype)


@kernel
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 24, 1100])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
def test_gathered_rows_equal_the_selected_ones(dtype, width, index_dtype):
    from engine.ops.gpu.gather_rows import gather_rows_triton

    x = rows_of(dtype, 9, width + 3).to(DEVICE)
    index = torch.randint(0, 9, (21,), dtype=index_dtype, device=DEVICE)
    for view in (x[:, :width], x[1:, 3 : 3 + width]):
        expected = view[index.long() % len(view)]
        buffer = torch.zeros(22, width + 5, dtype=dtype, device=DEVICE)
        for out in (None, buffer[1:, 1 : 1 + width], buffer[1:, 4 : 4 + width]):
            got = gather_rows_triton(view, index % len(view), out)
            assert torch.equal(got, expected)
            assert out is None or torch.equal(out, expected)
        assert not buffer[0].any()
    assert gather_rows_triton(x, index[:0]).shape == (0, width + 3)


FP8 = torch.float8_e4m3fn
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
PACKED = [(dtype, FP8) for dtype in FLOATS] + [(torch.float32, torch.bfloat16)]


def packed_size(width: int, payload: torch.dtype) -> tuple[int, int]:
    """Where the scale is, and the bytes of a packed row."""
    scale_at = -(-width * payload.itemsize // 4) * 4
    return scale_at, (scale_at + 4 + 15) // 16 * 16


@kernel
@pytest.mark.parametrize(("dtype", "payload"), PACKED, ids=str)
@pytest.mark.parametrize("width", [1, 7, 24, 2100])
def test_packed_rows_equal_the_reference_and_come_back_as_its_rows(dtype, payload, width):
    from engine.ops.gpu.pack_rows import pack_rows_triton
    from engine.ops.gpu.unpack_rows import unpack_rows_triton

    x = rows_of(torch.float32, 12, width + 2)[:, :width]
    x *= torch.logspace(-6, 2, 12)[:, None]
    x = x.to(dtype)
    x[1], x[2, 0] = 0.0, -0.0
    token = torch.tensor([3, 0, 0, 11, 1, 2, 7, 9, 8])
    scale_at, length = packed_size(width, payload)
    expected = torch.full((9, length), 7, dtype=torch.uint8)
    got = expected.to(DEVICE)
    pack_rows_reference(x, token, expected, payload, scale_at)
    pack_rows_triton(x.to(DEVICE), token.to(DEVICE), got, payload, scale_at)
    assert torch.equal(got.cpu(), expected)
    for index in (None, torch.tensor([8, 0, 0, 4])):
        rows = torch.zeros(9 if index is None else 4, width, dtype=dtype)
        mine = rows.to(DEVICE)
        unpack_rows_reference(expected, index, rows, payload, scale_at)
        on_device = None if index is None else index.to(DEVICE)
        unpack_rows_triton(got, on_device, mine, payload, scale_at)
        assert torch.equal(mine.cpu(), rows)


@kernel
def test_every_number_is_rounded_to_float8_as_torch_rounds_it():
    from engine.ops.gpu.pack_rows import pack_rows_triton
    from engine.ops.gpu.unpack_rows import unpack_rows_triton

    # Every float8 and what lies halfway between two, with neighbours; 448 makes the scale 1.
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    halves = (codes[1:] + codes[:-1]) / 2
    near = [halves, halves.nextafter(torch.tensor(0.0)), halves.nextafter(torch.tensor(1e9))]
    x = torch.cat((codes, *near))
    x = torch.cat((x, -x))[None]
    scale_at, length = packed_size(x.shape[1], FP8)
    expected = torch.zeros(1, length, dtype=torch.uint8)
    got = expected.to(DEVICE)
    token = torch.zeros(1, dtype=torch.int64)
    pack_rows_reference(x, token, expected, FP8, scale_at)
    pack_rows_triton(x.to(DEVICE), token.to(DEVICE), got, FP8, scale_at)
    assert torch.equal(got.cpu(), expected)
    out = torch.empty_like(x, device=DEVICE)
    unpack_rows_triton(got, None, out, FP8, scale_at)
    assert torch.equal(out.cpu(), expected[:, : x.shape[1]].view(FP8).float())


@kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_comes_back_as_nan_and_spoils_no_other(bad):
    from engine.ops.gpu.pack_rows import pack_rows_triton
    from engine.ops.gpu.unpack_rows import unpack_rows_triton

    x = torch.randn(3, 20, device=DEVICE)
    x[1, 5] = bad
    scale_at, length = packed_size(20, FP8)
    packed = torch.zeros(3, length, dtype=torch.uint8, device=DEVICE)
    pack_rows_triton(x, torch.arange(3, device=DEVICE), packed, FP8, scale_at)
    out = torch.empty_like(x)
    unpack_rows_triton(packed, None, out, FP8, scale_at)
    assert out[1].isnan().all() and out[0].isfinite().all() and out[2].isfinite().all()


@kernel
def test_rows_of_any_number_are_unpacked_by_one_launch(monkeypatch):
    from engine.ops.gpu import unpack_rows

    launches = []

    class Counted:
        def __getitem__(self, grid):
            return lambda *_args, **_options: launches.append(grid)

    monkeypatch.setattr(unpack_rows, "_unpack_rows_kernel", Counted())
    monkeypatch.setattr(triton_support, "serves", lambda _: True)
    packed = torch.zeros(2500, 16, dtype=torch.uint8, device=DEVICE)
    unpack = RowFormat(4, torch.float32, FP8).unpack
    unpack(packed, torch.arange(2500, device=DEVICE), torch.empty(2500, 4, device=DEVICE))
    assert launches == [(2500, 1)]
