"""round_rows and silu_and_round on CUDA: a Triton program rounds one row to float8_e4m3fn.

The row is in registers between its largest magnitude and its codes, so it is read once.

`scaled_ffn` imports this file only where Triton and a CUDA tensor are at hand.

Legend: R rows, I input columns, F hidden dim of the FFN.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.pack_rows import row_scale, to_float8
from engine.ops.gpu.variants import DTYPES, Variant, meta


@triton.jit(do_not_specialize_on_alignment=["index"])
def _round_rows_kernel(
    x,
    index,
    codes,
    scales,
    width,
    x_stride,
    GATHER: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    exists = column < width
    source = row
    if GATHER:
        source = tl.load(index + row)
    part = tl.load(x + source * x_stride + column, mask=exists, other=0.0)
    if SILU:
        up = tl.load(x + source * x_stride + width + column, mask=exists, other=0.0)
        gate = part.to(tl.float32)
        # Rounded where torch rounds: silu is an operator of its own there.
        part = (gate / (1.0 + tl.exp(-gate))).to(x.dtype.element_ty) * up
    part = part.to(tl.float32)
    scale = row_scale(part)
    code = to_float8(tl.div_rn(part, scale + tl.zeros([BLOCK], tl.float32)))
    tl.store(codes + row * width + column, code, mask=exists)
    tl.store(scales + row, scale)


def _launch(
    x: torch.Tensor, index_R: torch.Tensor | None, num_rows: int, width: int, *, silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    codes_RI = torch.empty(num_rows, width, dtype=torch.uint8, device=x.device)
    scale_R = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        x = x if x.stride(1) == 1 else x.contiguous()
        block = triton.next_power_of_2(width)
        _round_rows_kernel[(num_rows,)](
            x,
            x if index_R is None else index_R,
            codes_RI,
            scale_R,
            width,
            x.stride(0),
            GATHER=index_R is not None,
            SILU=silu,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8 if block <= 8192 else 16,
        )
    return codes_RI.view(torch.float8_e4m3fn), scale_R


def round_rows_triton(
    x_RI: torch.Tensor, index_R: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of `round_rows`: same arguments and results."""
    num_rows = len(x_RI) if index_R is None else len(index_R)
    return _launch(x_RI, index_R, num_rows, x_RI.shape[1], silu=False)


def silu_and_round_triton(gate_up_R2F: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton form of `silu_and_round`: same argument and results."""
    return _launch(gate_up_R2F, None, len(gate_up_R2F), gate_up_R2F.shape[1] // 2, silu=True)


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: rows in place and gathered, and the widest experts of Mixtral."""

    def rows(name: str, dtype: torch.dtype, width: int, gather: bool) -> Variant:
        def call(num: int) -> None:
            index_R = meta(3 * num, dtype=torch.int64)[num:] if gather else None
            round_rows_triton(meta(2 * num, width, dtype=dtype), index_R)

        return Variant(f"{name} rows{', gathered' if gather else ''}, dim {width}", call)

    def silu(name: str, dtype: torch.dtype, width: int) -> Variant:
        return Variant(
            f"{name} silu, dim {width}",
            lambda num: silu_and_round_triton(meta(num, 2 * width, dtype=dtype)),
        )

    for name, dtype in DTYPES.items():
        yield rows(name, dtype, 4096, True)
    yield rows("bf16", torch.bfloat16, 2048, False)
    for width in (768, 14336):
        yield silu("bf16", torch.bfloat16, width)
