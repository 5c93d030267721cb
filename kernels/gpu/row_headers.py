"""What precedes a unique row's payload on CUDA: weights by group, cells of rows, packed headers.

One Triton program per block of rows, with all numbers of a row: they are few.

`unique_rows` imports this file only where Triton and a CUDA tensor are at hand.

Legend: T tokens, M columns of the ids, G groups, U unique rows sent, e experts of a group, B bytes
of a bitmap, L bytes of a packed row, C cells (T * G), S numbers of a token.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from engine.ops.gpu.unique_rows import rows_per_program
from engine.ops.gpu.variants import Variant, meta


@triton.jit(do_not_specialize=["num_tokens"])
def _spread_weights_kernel(
    place,
    weights,
    out,
    num_tokens,
    size,
    COLUMNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PAD_S: tl.constexpr,
):
    t_T1 = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    exists_T1 = t_T1 < num_tokens
    s_1S = tl.arange(0, PAD_S)[None, :]
    out_TS = tl.zeros([BLOCK_T, PAD_S], tl.float32)
    for k in range(COLUMNS):
        place_T1 = tl.load(place + t_T1 * COLUMNS + k, mask=exists_T1, other=size)
        weight_T1 = tl.load(weights + t_T1 * COLUMNS + k, mask=exists_T1, other=0.0)
        out_TS = tl.where(s_1S == place_T1, weight_T1.to(tl.float32), out_TS)
    tl.store(out + t_T1.to(tl.int64) * size + s_1S, out_TS, mask=exists_T1 & (s_1S < size))


@triton.jit(do_not_specialize=["num_rows"])
def _cells_of_rows_kernel(
    token, load_G, cell, num_rows, num_groups, BLOCK_U: tl.constexpr, PAD_G: tl.constexpr
):
    u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    g = tl.arange(0, PAD_G)
    end_G = tl.cumsum(tl.load(load_G + g, mask=g < num_groups, other=0).to(tl.int32), axis=0)
    group_U = tl.sum((end_G[None, :] <= u[:, None]).to(tl.int32), axis=1)
    token_U = tl.load(token + u, mask=u < num_rows, other=0)
    tl.store(cell + u, token_U * num_groups + group_U, mask=u < num_rows)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["cell"])
def _pack_headers_kernel(
    cell,
    bits,
    weights,
    out_bits,
    out_weights,
    num_rows,
    num_bytes,
    num_weights,
    bits_stride,
    weights_stride,
    WEIGHTS: tl.constexpr,
    BLOCK_U: tl.constexpr,
    PAD_B: tl.constexpr,
    PAD_e: tl.constexpr,
):
    u_U1 = (tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U))[:, None]
    exists_U1 = u_U1 < num_rows
    cell_U1 = tl.load(cell + u_U1, mask=exists_U1, other=0)
    u_U1 = u_U1.to(tl.int64)
    b_1B = tl.arange(0, PAD_B)[None, :]
    in_UB = exists_U1 & (b_1B < num_bytes)
    bits_UB = tl.load(bits + cell_U1 * num_bytes + b_1B, mask=in_UB)
    tl.store(out_bits + u_U1 * bits_stride + b_1B, bits_UB, mask=in_UB)
    if WEIGHTS:
        e_1e = tl.arange(0, PAD_e)[None, :]
        in_Ue = exists_U1 & (e_1e < num_weights)
        weights_Ue = tl.load(weights + cell_U1 * num_weights + e_1e, mask=in_Ue)
        tl.store(out_weights + u_U1 * weights_stride + e_1e, weights_Ue, mask=in_Ue)


def spread_weights_triton(
    place_TM: torch.Tensor, weights_TM: torch.Tensor, size: int
) -> torch.Tensor:
    """Triton form of `spread_weights`: same arguments and result."""
    num_tokens, columns = place_TM.shape
    out_TS = weights_TM.new_empty(num_tokens, size, dtype=torch.float32)
    if num_tokens == 0:
        return out_TS
    pad = triton.next_power_of_2(size)
    block = rows_per_program(pad)
    _spread_weights_kernel[(triton.cdiv(num_tokens, block),)](
        place_TM.contiguous(),
        weights_TM.contiguous(),
        out_TS,
        num_tokens,
        size,
        COLUMNS=columns,
        BLOCK_T=block,
        PAD_S=pad,
    )
    return out_TS


def cells_of_rows_triton(token_U: torch.Tensor, load_G: torch.Tensor) -> torch.Tensor:
    """Triton form of `cells_of_rows`: same arguments and result."""
    num_rows, num_groups = token_U.numel(), load_G.numel()
    cell_U = torch.empty_like(token_U)
    if num_rows == 0:
        return cell_U
    pad = triton.next_power_of_2(num_groups)
    block = rows_per_program(pad)
    _cells_of_rows_kernel[(triton.cdiv(num_rows, block),)](
        token_U, load_G, cell_U, num_rows, num_groups, BLOCK_U=block, PAD_G=pad
    )
    return cell_U


def pack_headers_triton(
    cell_U: torch.Tensor,
    bits_CB: torch.Tensor,
    weights_Ce: torch.Tensor | None,
    out_UL: torch.Tensor,
    bits_at: int,
    weights_at: int,
) -> None:
    """Triton form of `pack_headers`: same arguments."""
    num_rows, num_bytes = cell_U.numel(), bits_CB.shape[1]
    if num_rows == 0:
        return
    bits_UB = out_UL[:, bits_at : bits_at + num_bytes]
    num_weights, weights_Ue = 0, bits_UB  # not read
    if weights_Ce is not None:
        num_weights = weights_Ce.shape[1]
        weights_Ue = out_UL[:, weights_at : weights_at + 4 * num_weights].view(torch.float32)
        weights_Ce = weights_Ce.contiguous()
    pad_b, pad_e = triton.next_power_of_2(num_bytes), triton.next_power_of_2(max(1, num_weights))
    block = rows_per_program(max(pad_b, pad_e))
    _pack_headers_kernel[(triton.cdiv(num_rows, block),)](
        cell_U,
        bits_CB.contiguous(),
        bits_CB if weights_Ce is None else weights_Ce,
        bits_UB,
        weights_Ue,
        num_rows,
        num_bytes,
        num_weights,
        bits_UB.stride(0),
        weights_Ue.stride(0),
        WEIGHTS=weights_Ce is not None,
        BLOCK_U=block,
        PAD_B=pad_b,
        PAD_e=pad_e,
    )


def variants() -> Iterator[Variant]:
    """Yield the calls to compile: 128 experts, 8 per token, on 8 ranks in 1 and 4 chunks."""
    for groups, experts in ((8, 16), (32, 4)):
        num_bytes = -(-experts // 8)

        def call(tokens: int, groups=groups, experts=experts, num_bytes=num_bytes) -> None:
            weights_TS = spread_weights_triton(
                meta(tokens, 8, dtype=torch.int64),
                meta(tokens, 8, dtype=torch.float32),
                groups * experts,
            )
            token_U = meta(3 * tokens, dtype=torch.int64)
            cell_U = cells_of_rows_triton(token_U, meta(groups, dtype=torch.int64))
            bits_CB = meta(tokens * groups, num_bytes, dtype=torch.uint8)
            out_UL = meta(2 * tokens, 4096 + 80, dtype=torch.uint8)
            for weights in (None, weights_TS.view(-1, experts)):
                pack_headers_triton(cell_U[tokens:], bits_CB, weights, out_UL, 4096 + 64, 4096)

        yield Variant(f"{groups} groups of {experts}", call)
