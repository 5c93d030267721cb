"""Row movement around the experts: gather rows into expert order, combine them back per token.

Packed rows are those of `engine/moe/dispatch/row_format.py`.

Legend: T tokens, K top-k, N rows (T * K when nothing is dropped), D model dim, U rows sent, V rows
received, R assignments received, L bytes of a packed row.
"""

import torch

from engine.ops import native, triton_support

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
# Rows unpacked at a time on the CPU: intermediates stay small compared to the row buffers.
_BLOCK = 1024


def gather_rows(
    x_TD: torch.Tensor, index_N: torch.Tensor, out_ND: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns x_TD[index_N]: [N, D]; index_N is int64 or int32 in 0 .. T - 1.

    out_ND: where to write it; a new tensor by default.
    """
    if triton_support.serves(x_TD):
        from engine.ops.gpu.gather_rows import gather_rows_triton

        return gather_rows_triton(x_TD, index_N, out_ND)
    return gather_rows_reference(x_TD, index_N, out_ND)


def combine_rows(
    rows_ND: torch.Tensor, slot_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Returns sum over k = 0 .. K - 1, in that order, of weights_TK * rows_ND[slot_TK]: [T, D].

    slot_TK (int64) names a row of rows_ND or is -1: that term is exactly zero and nothing is read.
    Sums in float32 whatever the dtype of the rows; the result has the dtype of rows_ND. K >= 1.
    """
    if native.serves(rows_ND, weights_TK):
        return torch.ops.lockstep_cpu.combine_rows(rows_ND, slot_TK, weights_TK)
    if triton_support.serves(rows_ND):
        from engine.ops.gpu.combine_rows import combine_rows_triton

        return combine_rows_triton(rows_ND, slot_TK, weights_TK)
    return combine_rows_reference(rows_ND, slot_TK, weights_TK)


def encode_rows(
    x_TD: torch.Tensor, payload: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return rows as `pack_rows` takes them, and their scales: cast to `payload`, float8_e4m3fn as
    uint8 with one float32 scale per row [T, 1], the row's largest magnitude / 448.

    Where Triton serves the rows are returned as they are: `pack_rows` casts what it copies.
    """
    if triton_support.serves(x_TD):
        return x_TD, None
    return encode_rows_reference(x_TD, payload)


def encode_rows_reference(
    x_TD: torch.Tensor, payload: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Plain torch form of `encode_rows`, which always casts."""
    if payload != _FP8:
        return x_TD.to(payload), None
    x_TD = x_TD.float()
    scale_T1 = x_TD.abs().amax(1, keepdim=True) / _FP8_MAX
    scale_T1 = scale_T1.clamp(min=torch.finfo(torch.float32).tiny)  # NaN stays NaN
    return (x_TD / scale_T1).to(_FP8).view(torch.uint8), scale_T1


def pack_rows(
    encoded: tuple[torch.Tensor, torch.Tensor | None],
    token_U: torch.Tensor,
    out_UL: torch.Tensor,
    payload: torch.dtype,
    scale_at: int,
) -> None:
    """Write the rows token_U (int64) of `encode_rows` into packed rows, uint8 [U, L].

    scale_at: where in a packed row the scale is, a multiple of 4 bytes.
    """
    rows_TD, scale_T1 = encoded
    if not triton_support.serves(rows_TD):
        copy_rows(rows_TD, scale_T1, token_U, out_UL, payload, scale_at)
    elif rows_TD.dtype == payload:
        gather_rows(rows_TD, token_U, out_UL.view(payload)[:, : rows_TD.shape[1]])
    else:
        from engine.ops.gpu.pack_rows import pack_rows_triton

        pack_rows_triton(rows_TD, token_U, out_UL, payload, scale_at)


def pack_rows_reference(
    x_TD: torch.Tensor,
    token_U: torch.Tensor,
    out_UL: torch.Tensor,
    payload: torch.dtype,
    scale_at: int,
) -> None:
    """Plain torch form of `pack_rows` for rows that are not encoded yet."""
    rows_TD, scale_T1 = encode_rows_reference(x_TD, payload)
    copy_rows(rows_TD, scale_T1, token_U, out_UL, payload, scale_at)


def copy_rows(
    rows_TD: torch.Tensor,
    scale_T1: torch.Tensor | None,
    token_U: torch.Tensor,
    out_UL: torch.Tensor,
    payload: torch.dtype,
    scale_at: int,
) -> None:
    """Write encoded rows and their scales into packed rows."""
    dtype = torch.uint8 if payload == _FP8 else payload
    gather_rows_reference(rows_TD, token_U, out_UL.view(dtype)[:, : rows_TD.shape[1]])
    if scale_T1 is not None:
        scale_U1 = out_UL[:, scale_at : scale_at + 4].view(torch.float32)
        scale_U1.copy_(scale_T1.index_select(0, token_U))


def unpack_rows(
    recv_VL: torch.Tensor,
    index_R: torch.Tensor | None,
    out_RD: torch.Tensor,
    payload: torch.dtype,
    scale_at: int,
) -> None:
    """Write packed rows, those of index_R (int64; None: all in order), into out_RD."""
    if payload == out_RD.dtype:
        rows_VD = recv_VL.view(payload)[:, : out_RD.shape[1]]
        if index_R is None:
            out_RD.copy_(rows_VD)
        else:
            gather_rows(rows_VD, index_R, out_RD)
    elif triton_support.serves(recv_VL):
        from engine.ops.gpu.unpack_rows import unpack_rows_triton

        unpack_rows_triton(recv_VL, index_R, out_RD, payload, scale_at)
    else:
        unpack_rows_reference(recv_VL, index_R, out_RD, payload, scale_at)


def unpack_rows_reference(
    recv_VL: torch.Tensor,
    index_R: torch.Tensor | None,
    out_RD: torch.Tensor,
    payload: torch.dtype,
    scale_at: int,
) -> None:
    """Plain torch form of `unpack_rows` for rows that are cast."""
    for start in range(0, out_RD.shape[0], _BLOCK):
        block = slice(start, min(start + _BLOCK, out_RD.shape[0]))
        if index_R is None:
            part = recv_VL[block]
        else:
            part = recv_VL.index_select(0, index_R[block])
        rows = part.view(payload)[:, : out_RD.shape[1]]
        if payload == _FP8:
            out_RD[block] = rows.float() * part[:, scale_at : scale_at + 4].view(torch.float32)
        else:
            out_RD[block] = rows


def gather_rows_reference(
    x_TD: torch.Tensor, index_N: torch.Tensor, out_ND: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain torch form of `gather_rows`."""
    if out_ND is None:
        return x_TD.index_select(0, index_N)
    return torch.index_select(x_TD, 0, index_N, out=out_ND)


def combine_rows_reference(
    rows_ND: torch.Tensor, slot_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Plain torch form of `combine_rows`."""
    num_tokens, top_k = slot_TK.shape
    out_TD = rows_ND.new_zeros(num_tokens, rows_ND.shape[1], dtype=torch.float32)
    if rows_ND.shape[0] == 0:
        return out_TD.to(rows_ND.dtype)
    for k in range(top_k):
        present_T1 = slot_TK[:, k, None] >= 0
        rows_TD = rows_ND.index_select(0, slot_TK[:, k].clamp(min=0)).float()
        # where, not a product with zero: a row that is not read may hold NaN.
        out_TD += torch.where(present_T1, weights_TK[:, k, None].float() * rows_TD, 0.0)
    return out_TD.to(rows_ND.dtype)
