"""rms_norm and add_rms_norm on CUDA: one Triton program a row, which stays in registers.

`rms_norm` imports this file only where Triton and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight_D,
    out,
    x_row,
    dim,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    exists = column < dim
    row_D = tl.load(x + row * x_row + column, mask=exists, other=0.0)
    weight = tl.load(weight_D + column, mask=exists, other=0.0)
    if ADD:
        to_D = residual + row * dim + column
        row_D += tl.load(to_D, mask=exists, other=0.0)
        tl.store(to_D, row_D, mask=exists)
    wide_D = row_D.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide_D * wide_D, axis=0) / dim + eps)
    # Rounded where torch rounds: the weight multiplies what is back in the dtype of the row.
    normed_D = (wide_D * scale).to(row_D.dtype) * weight
    tl.store(out + row * dim + column, normed_D, mask=exists)


def rms_norm_triton(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Triton form of `rms_norm`, with a residual that of `add_rms_norm`."""
    dim = x_TD.shape[-1]
    out_TD = x_TD.new_empty(x_TD.shape)
    if out_TD.numel() == 0:
        return out_TD
    assert residual_TD is None or residual_TD.is_contiguous()
    rows_TD = x_TD.reshape(-1, dim)
    rows_TD = rows_TD if rows_TD.stride(1) == 1 else rows_TD.contiguous()
    block, num_warps = _tile(dim)
    _rms_norm_kernel[(rows_TD.shape[0],)](
        rows_TD,
        out_TD if residual_TD is None else residual_TD,
        weight_D,
        out_TD,
        rows_TD.stride(0),
        dim,
        eps,
        ADD=residual_TD is not None,
        BLOCK=block,
        num_warps=num_warps,
    )
    return out_TD


def _tile(dim: int) -> tuple[int, int]:
    """Returns the columns of a program and its warps: 8 columns a thread, 16 bytes in bfloat16."""
    block = triton.next_power_of_2(dim)
    return block, min(16, max(1, block // 256))


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: widths of models and of a latent, alone and with a residual."""

    def variant(name: str, dtype: torch.dtype, dim: int, add: bool) -> Variant:
        def call(rows: int) -> None:
            x_TD = meta(rows, dim + 576, dtype=dtype)[:, :dim]  # a view of a joint projection
            residual_TD = meta(rows, dim, dtype=dtype) if add else None
            rms_norm_triton(x_TD, meta(dim, dtype=dtype), 1e-6, residual_TD)

        return Variant(f"{name} dim {dim}{', residual' if add else ''}", call)

    yield variant("bf16", torch.bfloat16, 1536, add=False)
    yield variant("bf16", torch.bfloat16, 2048, add=True)
    yield variant("bf16", torch.bfloat16, 7168, add=True)
    for name, dtype in DTYPES.items():
        yield variant(name, dtype, 4096, add=True)
