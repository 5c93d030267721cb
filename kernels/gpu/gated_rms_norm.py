"""gated_rms_norm on CUDA: one Triton program per (row, run of heads).

`gated_rms_norm` imports this file only where Triton and a CUDA tensor are at hand.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit(do_not_specialize_on_alignment=["rows_R"])
def _gated_rms_norm_kernel(
    x,
    gate,
    weight_V,
    rows_R,
    out,
    gate_token,
    eps,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(rows_R + row) if HAS_ROWS else row
    head_H1 = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    dim_V = tl.arange(0, PAD)
    exists_HV = (head_H1 < HEADS) & (dim_V < DIM)[None, :]
    at_HV = head_H1 * DIM + dim_V[None, :]
    x_HV = tl.load(x + token * (HEADS * DIM) + at_HV, mask=exists_HV, other=0.0)
    gate_HV = tl.load(gate + token * gate_token + at_HV, mask=exists_HV, other=0.0).to(tl.float32)
    weight_1V = tl.load(weight_V + dim_V, mask=dim_V < DIM, other=0.0)[None, :]
    wide_HV = x_HV.to(tl.float32)
    scale_H1 = 1.0 / tl.sqrt(tl.sum(wide_HV * wide_HV, axis=1) / DIM + eps)[:, None]
    # Rounded where torch rounds: the weight multiplies what is back in the dtype of x.
    normed_HV = (wide_HV * scale_H1).to(x_HV.dtype) * weight_1V
    gated_HV = normed_HV.to(tl.float32) * (gate_HV / (1.0 + tl.exp(-gate_HV)))
    tl.store(out + row * (HEADS * DIM) + at_HV, gated_HV.to(x_HV.dtype), mask=exists_HV)


def gated_rms_norm_triton(
    x_THV: torch.Tensor,
    gate_TO: torch.Tensor,
    weight_V: torch.Tensor,
    eps: float,
    rows_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Triton form of `gated_rms_norm`: same arguments and result."""
    num_tokens, heads, dim = x_THV.shape
    num_rows = num_tokens if rows_R is None else rows_R.shape[0]
    out_RO = x_THV.new_empty(num_rows, heads * dim)
    if out_RO.numel() == 0:
        return out_RO
    x_THV = x_THV.contiguous()
    gate_TO = gate_TO if gate_TO.stride(1) == 1 else gate_TO.contiguous()
    block_h, pad, num_warps = _tile(heads, dim)
    _gated_rms_norm_kernel[num_rows, triton.cdiv(heads, block_h)](
        x_THV,
        gate_TO,
        weight_V,
        x_THV if rows_R is None else rows_R,
        out_RO,
        gate_TO.stride(0),
        eps,
        HEADS=heads,
        DIM=dim,
        HAS_ROWS=rows_R is not None,
        BLOCK_H=block_h,
        PAD=pad,
        num_warps=num_warps,
    )
    return out_RO


def _tile(heads: int, dim: int) -> tuple[int, int, int]:
    """Returns the heads of a program, the padded dim and warps: 8 numbers a thread, 16 bytes."""
    pad = triton.next_power_of_2(dim)
    block_h = min(triton.next_power_of_2(heads), max(1, 1024 // pad))
    return block_h, pad, max(1, block_h * pad // 256)


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: the heads of Qwen3-Next-80B, all rows and the last ones."""

    def variant(name: str, some: bool) -> Variant:
        dtype, heads, dim = DTYPES[name], 32, 128

        def call(tokens: int) -> None:
            joint_TO = meta(tokens, 12352, dtype=dtype)
            rows_R = meta(-(-tokens // 2), dtype=torch.int64) if some else None
            gate_TO = joint_TO[:, 8192 : 8192 + heads * dim]
            x_THV = meta(tokens, heads, dim, dtype=dtype)
            gated_rms_norm_triton(x_THV, gate_TO, meta(dim, dtype=dtype), 1e-6, rows_R)

        return Variant(f"{name} {heads} heads of {dim}{', some rows' if some else ''}", call)

    for name in DTYPES:
        yield variant(name, some=False)
    yield variant("bf16", some=True)
