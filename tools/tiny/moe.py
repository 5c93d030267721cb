"""The training-side MoE layer: top-k routing, experts as equal blocks of rows, no drops.

Called by tiny/model.py. A CPU wants one batched product a projection, of the same shape at every
step, instead of a loop over experts whose sizes change.

Shapes: T tokens of the batch, D model dim, F expert hidden dim, K top-k, E experts, N = T*K
assignments, P padded rows of all experts, B blocks of R rows.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny.arch import TinyArch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK_ROWS = 64


class _Dispatch(torch.autograd.Function):
    """Copy tokens to their padded expert rows; the backward gathers and sums over top-k.

    Autograd's own backward is a scatter-add over unsorted rows, several times slower on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_P: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD.index_select(0, source_P)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor):  # type: ignore[override]
        (row_TK,) = ctx.saved_tensors
        grad_ND = grad_PD.index_select(0, row_TK.flatten())
        return grad_ND.view(*row_TK.shape, -1).sum(dim=1), None, None


class _Combine(torch.autograd.Function):
    """Bring expert rows back to [T, K, D]; the backward leaves padding rows zero."""

    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        ctx.num_rows = y_PD.shape[0]
        return y_PD.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1)

    @staticmethod
    def backward(ctx: Any, grad_TKD: Tensor):  # type: ignore[override]
        (row_TK,) = ctx.saved_tensors
        grad_PD = grad_TKD.new_zeros(ctx.num_rows, grad_TKD.shape[-1])
        return grad_PD.index_copy_(0, row_TK.flatten(), grad_TKD.flatten(0, 1)), None


class Gate(nn.Module):
    """Router weights, [E, D]."""

    def __init__(self, arch: TinyArch) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(arch.num_experts, arch.hidden_size))


class Experts(nn.Module):
    """Stacked SwiGLU experts: gate_up_proj [E, 2F, D], down_proj [E, D, F]."""

    def __init__(self, arch: TinyArch) -> None:
        super().__init__()
        hidden, inner = arch.hidden_size, arch.expert_hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(arch.num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(arch.num_experts, hidden, inner))

    def forward(self, x_PD: Tensor, expert_B: Tensor) -> Tensor:
        """Apply expert expert_B[b] (int64) to the b-th block of BLOCK_ROWS rows."""
        x_BRD = x_PD.view(expert_B.numel(), BLOCK_ROWS, -1)
        # Weights are repeated for their blocks by a product with zeros and ones: its backward adds
        # the blocks of an expert by a product too, where that of index_select is a slow scatter.
        pick_BE = F.one_hot(expert_B, self.down_proj.shape[0]).to(x_PD.dtype)
        up_BFD, down_BDF = (
            (pick_BE @ weight.to(x_PD.dtype).flatten(1)).unflatten(1, weight.shape[1:])
            for weight in (self.gate_up_proj, self.down_proj)
        )
        gate, up = torch.bmm(x_BRD, up_BFD.mT).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, down_BDF.mT).flatten(0, 1)


def block_rows(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give every assignment a row, experts in order, each expert's rows padded to whole blocks.

    The number of rows depends on the shapes alone, never on the routing: oneDNN compiles a kernel
    for every new shape, which costs more than the product. Returns the row of each assignment
    int64 [T, K], the token of each row int64 [P] (0 for padding), the expert of each block int64
    [P / BLOCK_ROWS] and the load int64 [E]. Example with blocks of 4: loads 5, 0, 2 take blocks
    0 0 2; loads need at most N/4 + E blocks, so the rest belong to the last expert and stay empty.
    """
    ids_N = ids_TK.flatten()
    load_E = torch.bincount(ids_N, minlength=num_experts)
    blocks_E = (load_E + BLOCK_ROWS - 1) // BLOCK_ROWS
    num_blocks = ids_N.numel() // BLOCK_ROWS + num_experts
    ends_E = blocks_E.cumsum(0)
    expert_B = torch.bucketize(torch.arange(num_blocks), ends_E, right=True)
    order_N = ids_N.argsort(stable=True)
    shift_E = (ends_E - blocks_E) * BLOCK_ROWS - (load_E.cumsum(0) - load_E)
    row_N = torch.empty_like(ids_N)
    row_N[order_N] = torch.arange(ids_N.numel()) + shift_E[ids_N[order_N]]
    source_P = torch.zeros(num_blocks * BLOCK_ROWS, dtype=torch.int64)
    source_P[row_N] = torch.arange(ids_N.numel()) // ids_TK.shape[1]
    return row_N.view_as(ids_TK), source_P, expert_B.clamp(max=num_experts - 1), load_E


class MoE(nn.Module):
    """Top-k routing over all experts, without capacity: no assignment is dropped in training."""

    def __init__(self, arch: TinyArch) -> None:
        super().__init__()
        self.arch = arch
        self.gate = Gate(arch)
        self.experts = Experts(arch)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output [T, D], the balance loss (scalar) and the load int64 [E]."""
        arch = self.arch
        # In float32: a bfloat16 router would choose other experts than the exported float32 model.
        with torch.autocast("cpu", enabled=False):
            probs_TE = F.linear(x_TD.float(), self.gate.weight).softmax(dim=-1)
        weights_TK, ids_TK = probs_TE.topk(arch.top_k, dim=-1)
        if arch.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        row_TK, source_P, expert_B, load_E = block_rows(ids_TK, arch.num_experts)
        y_PD = self.experts(_Dispatch.apply(x_TD, source_P, row_TK), expert_B)
        y_TKD = _Combine.apply(y_PD, row_TK)
        out_TD = torch.einsum("tkd,tk->td", y_TKD, weights_TK.to(y_TKD.dtype))
        # Switch Transformer's balance loss (Fedus et al. 2021, section 2.2): 1 when even.
        balance = arch.num_experts * (load_E / load_E.sum() * probs_TE.mean(dim=0)).sum()
        return out_TD, balance, load_E
