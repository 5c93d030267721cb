"""What a kernel module declares so that its kernels are compiled and measured without a GPU.

Its function `variants()` yields calls of the module's own launcher, on tensors that have shapes and
no memory, so the tiles, warps and specialised arguments that are compiled are those of a real step.
`tools/compile_kernels.py` compiles them; a test calls them with changing sizes and counts kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Every dtype that a model can have; names as they stand in the names of variants.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to call a launcher; each kernel that it launches is a row of the table."""

    name: str  # unique in its module: dtype, then what is special: "bf16 decode, head 128"
    # Calls the launcher once for that many tokens (attention: sequences). Whatever changes from
    # step to step depends on the number: all numbers must give the same compiled kernels.
    call: Callable[[int], object]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Return a tensor of that shape that has no memory: enough to choose and compile a kernel."""
    return torch.empty(shape, dtype=dtype, device="meta")
