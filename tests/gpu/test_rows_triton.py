"""The Triton kernels that move rows, against torch: bit for bit.

TRITON_INTERPRET=1 python -m pytest tests/gpu/test_rows_triton.py
"""

import pytest
import torch

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
