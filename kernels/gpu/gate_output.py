"""gate_output on CUDA: one Triton program a row, the projection in float32.

`silu_and_mul` imports this file only where Triton and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit
def _gate_output_kernel(rows, x, gate_D, gated, rows_token, x_token, dim, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    exists = column < dim
    x_D = tl.load(x + token * x_token + column, mask=exists, other=0.0).to(tl.float32)
    gate = tl.load(gate_D + column, mask=exists, other=0.0).to(tl.float32)
    row_D = tl.load(rows + token * rows_token + column, mask=exists, other=0.0)
    # Rounded where torch rounds: projection, sigmoid and product are operators of their own there.
    logit = tl.sum(x_D * gate, axis=0).to(row_D.dtype).to(tl.float32)
    factor = (1.0 / (1.0 + tl.exp(-logit))).to(row_D.dtype)
    tl.store(gated + token * dim + column, row_D * factor, mask=exists)


def gate_output_triton(
    out_TD: torch.Tensor, x_TD: torch.Tensor, gate_1D: torch.Tensor
) -> torch.Tensor:
    """Triton form of `gate_output`: same arguments and result."""
    num_tokens, dim = out_TD.shape
    gated_TD = out_TD.new_empty(num_tokens, dim)
    if num_tokens == 0:
        return gated_TD
    out_TD, x_TD = (x if x.stride(1) == 1 else x.contiguous() for x in (out_TD, x_TD))
    block, num_warps = _tile(dim)
    _gate_output_kernel[(num_tokens,)](
        out_TD,
        x_TD,
        gate_1D,
        gated_TD,
        out_TD.stride(0),
        x_TD.stride(0),
        dim,
        BLOCK=block,
        num_warps=num_warps,
    )
    return gated_TD


def _tile(dim: int) -> tuple[int, int]:
    """Returns the columns of a program and its warps: 8 columns a thread, 16 bytes in bfloat16."""
    block = triton.next_power_of_2(dim)
    return block, min(16, max(1, block // 256))


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: the widths of Qwen1.5-MoE and Qwen2-57B-A14B."""

    def variant(name: str, dtype: torch.dtype, dim: int) -> Variant:
        def call(rows: int) -> None:
            out_TD, x_TD = meta(rows, dim, dtype=dtype), meta(rows, dim, dtype=dtype)
            gate_output_triton(out_TD, x_TD, meta(1, dim, dtype=dtype))

        return Variant(f"{name} dim {dim}", call)

    for name, dtype in DTYPES.items():
        yield variant(name, dtype, 2048)
    yield variant("bf16", torch.bfloat16, 3584)
