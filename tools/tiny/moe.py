"""The training-side MoE layer: top-k routing, experts as runs of padded rows, no drops.

Called by tiny/model.py. Autograd's own backward of these steps scatters over unsorted rows and
copies weights for their transposes; each step here defines its own backward.

Shapes: T tokens of the batch, D model dim, F expert hidden dim, K top-k, E experts, N = T*K
assignments, P padded rows of all experts.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny.arch import TinyArch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK_ROWS = 64


class _Dispatch(torch.autograd.Function):
    """Copy tokens to their padded expert rows; the backward sums a token's K rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, source_P: Tensor, row_KT: Tensor) -> Tensor:
        ctx.save_for_backward(row_KT)
        return x_TD.index_select(0, source_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_PD,) = grads
        (row_KT,) = ctx.saved_tensors
        grad_TD = grad_PD.index_select(0, row_KT[0])
        for row_T in row_KT[1:]:
            grad_TD += grad_PD.index_select(0, row_T)
        return grad_TD, None, None


class _Combine(torch.autograd.Function):
    """Weigh and sum the K expert rows of every token; padding rows get no gradient."""

    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, weights_KT1: Tensor, row_KT: Tensor) -> Tensor:
        ctx.save_for_backward(y_PD, weights_KT1, row_KT)
        out_TD = y_PD.index_select(0, row_KT[0]).mul_(weights_KT1[0])
        for row_T, weight_T1 in zip(row_KT[1:], weights_KT1[1:], strict=True):
            out_TD.addcmul_(y_PD.index_select(0, row_T), weight_T1)
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TD,) = grads
        y_PD, weights_KT1, row_KT = ctx.saved_tensors
        grad_PD, grad_KT1 = torch.zeros_like(y_PD), torch.empty_like(weights_KT1)
        for row_T, weight_T1, grad_T1 in zip(row_KT, weights_KT1, grad_KT1, strict=True):
            torch.sum(y_PD.index_select(0, row_T).mul_(grad_TD), dim=1, keepdim=True, out=grad_T1)
            grad_PD.index_copy_(0, row_T, grad_TD * weight_T1)
        return grad_PD, grad_KT1, None


class _SwiGLUExperts(torch.autograd.Function):
    """Every expert on its run of rows: `silu(gate) * up`, then down."""

    @staticmethod
    def forward(
        ctx: Any, x_PD: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor, runs: list[slice]
    ) -> Tensor:
        hidden_PH = x_PD.new_empty(x_PD.shape[0], gate_up_EHD.shape[1])
        y_PD = torch.empty_like(x_PD)
        for run, weight_HD in zip(runs, gate_up_EHD, strict=True):
            torch.mm(x_PD[run], weight_HD.mT, out=hidden_PH[run])
        gate_PF, up_PF = hidden_PH.chunk(2, dim=-1)
        inner_PF = F.silu(gate_PF).mul_(up_PF)
        for run, weight_DF in zip(runs, down_EDF, strict=True):
            torch.mm(inner_PF[run], weight_DF.mT, out=y_PD[run])
        ctx.runs = runs
        ctx.save_for_backward(x_PD, gate_up_EHD, down_EDF, hidden_PH, inner_PF)
        return y_PD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_PD,) = grads
        x_PD, gate_up_EHD, down_EDF, hidden_PH, inner_PF = ctx.saved_tensors
        gate_PF, up_PF = hidden_PH.chunk(2, dim=-1)
        grad_inner_PF, grad_hidden_PH = torch.empty_like(inner_PF), torch.empty_like(hidden_PH)
        grad_x_PD = torch.empty_like(x_PD)
        grad_gate_up_EHD, grad_down_EDF = torch.empty_like(gate_up_EHD), torch.empty_like(down_EDF)
        for e, run in enumerate(ctx.runs):
            torch.mm(grad_PD[run], down_EDF[e], out=grad_inner_PF[run])
            torch.mm(grad_PD[run].mT, inner_PF[run], out=grad_down_EDF[e])
        grad_gate_PF, grad_up_PF = grad_hidden_PH.chunk(2, dim=-1)
        torch.mul(grad_inner_PF, F.silu(gate_PF), out=grad_up_PF)
        grad_gate_PF.copy_(torch.ops.aten.silu_backward(grad_inner_PF.mul_(up_PF), gate_PF))
        for e, run in enumerate(ctx.runs):
            torch.mm(grad_hidden_PH[run], gate_up_EHD[e], out=grad_x_PD[run])
            torch.mm(grad_hidden_PH[run].mT, x_PD[run], out=grad_gate_up_EHD[e])
        return grad_x_PD, grad_gate_up_EHD, grad_down_EDF, None


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

    def forward(self, x_PD: Tensor, runs: list[slice]) -> Tensor:
        """Apply expert e to the rows of runs[e]; the runs cover x_PD in order."""
        gate_up_EHD, down_EDF = self.gate_up_proj.to(x_PD.dtype), self.down_proj.to(x_PD.dtype)
        out = _SwiGLUExperts.apply(x_PD, gate_up_EHD, down_EDF, runs)
        assert isinstance(out, Tensor)
        return out


def expert_runs(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[slice], Tensor]:
    """Give every assignment a row, experts in order, each expert's rows padded to whole blocks.

    Blocks of BLOCK_ROWS keep the shapes few: oneDNN compiles a kernel for every new one. Returns
    the row of each assignment int64 [K, T], the token of each row int64 [P] (0 for padding), the
    rows of each expert and the load int64 [E]. Example with blocks of 4: loads 5, 0, 2 take rows
    0-7, none and 8-11.
    """
    ids_N = ids_TK.flatten()
    load_E = torch.bincount(ids_N, minlength=num_experts)
    rows_E = (load_E + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
    ends_E = rows_E.cumsum(0)
    order_N = ids_N.argsort(stable=True)
    shift_E = (ends_E - rows_E) - (load_E.cumsum(0) - load_E)
    row_N = torch.empty_like(ids_N)
    row_N[order_N] = torch.arange(ids_N.numel()) + shift_E[ids_N[order_N]]
    ends = ends_E.tolist()
    source_P = torch.zeros(ends[-1], dtype=torch.int64)
    source_P[row_N] = torch.arange(ids_N.numel()) // ids_TK.shape[1]
    runs = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    return row_N.view_as(ids_TK).T.contiguous(), source_P, runs, load_E


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
        row_KT, source_P, runs, load_E = expert_runs(ids_TK, arch.num_experts)
        y_PD = self.experts(_Dispatch.apply(x_TD, source_P, row_KT), runs)
        out_TD = _Combine.apply(y_PD, weights_TK.to(y_PD.dtype).T.unsqueeze(-1), row_KT)
        assert isinstance(out_TD, Tensor)
        # Switch Transformer's balance loss (Fedus et al. 2021, section 2.2): 1 when even.
        balance = arch.num_experts * (load_E / load_E.sum() * probs_TE.mean(dim=0)).sum()
        return out_TD, balance, load_E
