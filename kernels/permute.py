"""Row movement around the experts: gather rows into expert order, combine them back per token.

Legend: T tokens, K top-k, N rows (T * K when nothing is dropped), D model dim.
"""

import torch

from engine.ops import native, triton_support


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
