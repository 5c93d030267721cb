"""Where the tests of the Triton kernels run: on a CUDA device, else in Triton's interpreter.

`tests/conftest.py` chooses the interpreter before anything imports triton.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# The interpreter multiplies bfloat16, numbers and matrices, wrongly and says nothing: float32 and
# float16 stand for it. All three are compiled (tests/gpu/test_compiled_kernels.py).
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
# For kernels that move numbers, or compute in float32. When it converts to bfloat16, the
# interpreter cuts off where a GPU rounds.
MOVED_DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Marks the test of a kernel.
kernel = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs triton, and a CUDA device or TRITON_INTERPRET=1",
)
