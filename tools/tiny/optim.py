"""Muon for the matrices, AdamW for the rest: twice AdamW's progress per token at this size.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises each momentum
matrix by a Newton-Schulz iteration; the scale 0.2 * sqrt(longer side) gives its update AdamW's
root mean square (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2), so both
halves share one learning rate. Experts are stacks of matrices, orthogonalised as a batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of every matrix [n, rows, columns] near one, in `dtype`."""
    a, b, c = _NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(dtype)
    if is_tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient; closures are not supported."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            directions = [self._direction(p, group["momentum"]) for p in params]
            # gate_up_proj stacks two matrices of an expert: each half is its own map.
            stacks = [d.unflatten(-2, (2, -1)) if d.ndim == 3 else d for d in directions]
            for parameter, update in zip(params, self._orthogonalised(stacks), strict=True):
                scale = 0.2 * max(update.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape_as(parameter), alpha=-group["lr"] * scale)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        average = state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)

    def _orthogonalised(self, stacks: list[Tensor]) -> list[Tensor]:
        """Orthogonalise matrices [..., rows, columns]; all of one shape in one batch."""
        by_shape = defaultdict[torch.Size, list[int]](list)
        for index, stack in enumerate(stacks):
            by_shape[stack.shape[-2:]].append(index)
        updates = list(stacks)
        for shape, indices in by_shape.items():
            flat = [stacks[index].reshape(-1, *shape) for index in indices]
            batch = orthogonalise(torch.cat(flat), self.dtype)
            parts = batch.split([len(part) for part in flat])
            for index, part in zip(indices, parts, strict=True):
                updates[index] = part.view_as(stacks[index])
        return updates


def make_optimizers(
    model: nn.Module, *, lr: float, weight_decay: float, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Return Muon for attention and expert matrices, AdamW for all other parameters."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not any(
            part in name for part in ("embed_tokens", "lm_head", "gate.weight")
        )
        (matrices if is_matrix else others).append(parameter)
    return [
        Muon(matrices, lr=lr, weight_decay=weight_decay, dtype=dtype),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
