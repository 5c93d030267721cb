"""Two steps of the training model with a backward of their own: RMS norm and cross-entropy.

Called by tiny/model.py and train_tiny.py. In bfloat16 autograd's own make float32 copies of whole
activations and logits, which on a CPU takes as long as the products between them.

Shapes: N tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_TOKENS = 128  # float32 logits of a chunk stay in a core's cache


class RMSNormFunction(torch.autograd.Function):
    """`x / rms(x) * weight` over the last dim, of x's dtype; squares are summed in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Normalise x [..., D]."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight_D)
        return unit * weight_D

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of x and of the weight."""
        (grad,) = grads
        unit, scale, weight_D = ctx.saved_tensors
        grad_weight = (grad * unit).flatten(0, -2).sum(dim=0)
        grad_unit = grad * weight_D
        along = (grad_unit * unit).mean(dim=-1, keepdim=True)
        return grad_unit.addcmul_(unit, along, value=-1).mul_(scale), grad_weight, None


class TokenLosses(torch.autograd.Function):
    """Cross-entropy of every token: logits [N, V] and targets int64 [N] to float32 [N], in nats."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        """Return losses, chunk by chunk."""
        totals = [rows.float().logsumexp(dim=-1) for rows in logits_NV.split(_CHUNK_TOKENS)]
        total_N = torch.cat(totals)
        ctx.save_for_backward(logits_NV, targets_N, total_N)
        return total_N - logits_NV.gather(1, targets_N[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradient of the logits, of their dtype."""
        (grad_N,) = grads
        logits_NV, targets_N, total_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        columns = (targets_N[:, None], total_N[:, None], grad_N[:, None])
        chunks = zip(
            logits_NV.split(_CHUNK_TOKENS),
            grad_NV.split(_CHUNK_TOKENS),
            *(column.split(_CHUNK_TOKENS) for column in columns),
            strict=True,
        )
        for rows, grad_rows, target, total, grad in chunks:
            share = rows.float().sub_(total).exp_().mul_(grad)
            grad_rows.copy_(share.scatter_add_(1, target, -grad))
        return grad_NV, None
