"""The training model of the bundled checkpoints: its own backward steps against autograd's.

Each reference is the textbook formula, whose gradients autograd takes.
Run: pytest tests/tools/test_tiny_training.py
"""

from __future__ import annotations

import pytest
import torch
from tiny.arch import TinyArch
from tiny.backward import RMSNormFunction, TokenLosses
from tiny.moe import BLOCK_ROWS, MoE, expert_runs
from tiny.optim import Muon, orthogonalise
from torch.nn import functional as F


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_moe(moe: MoE, x_TD: torch.Tensor) -> torch.Tensor:
    """Every token through its own experts, one by one."""
    arch = moe.arch
    # The router is float32 in the model too.
    probs_TE = F.linear(x_TD.float(), moe.gate.weight).softmax(dim=-1)
    weights_TK, ids_TK = probs_TE.topk(arch.top_k, dim=-1)
    if arch.norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    rows = []
    for x_D, weights, ids in zip(x_TD, weights_TK.to(x_TD.dtype), ids_TK.tolist(), strict=True):
        row = torch.zeros_like(x_D)
        for weight, e in zip(weights, ids, strict=True):
            gate, up = (moe.experts.gate_up_proj[e].to(x_D.dtype) @ x_D).chunk(2)
            row = row + weight * (moe.experts.down_proj[e].to(x_D.dtype) @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "is_normalised"), [(8, 2, True), (5, 1, False), (6, 4, False)]
)
def test_moe_and_its_gradients_are_those_of_one_token_at_a_time(
    num_experts: int, top_k: int, is_normalised: bool
) -> None:
    arch = TinyArch(
        model_type="mixtral",
        hidden_size=16,
        num_experts=num_experts,
        top_k=top_k,
        expert_hidden_size=12,
        norm_topk_prob=is_normalised,
    )
    moe = MoE(arch)
    for seed, parameter in enumerate(moe.parameters()):
        parameter.data = 0.3 * tokens(*parameter.shape, seed=seed).float()
    # One expert gets nothing: the last one's router row points away from every token.
    x_TD = tokens(200, 16, seed=9)
    x_TD[:, 0] = 3.0
    moe.gate.weight.data[-1] = 0.0
    moe.gate.weight.data[-1, 0] = -9.0
    grad_TD = tokens(200, 16, seed=10)

    got_x, want_x = x_TD.clone().requires_grad_(), x_TD.clone().requires_grad_()
    out_TD, _, load_E = moe(got_x)
    assert load_E[-1] == 0
    assert load_E.max() > BLOCK_ROWS  # and one has more than a block
    (out_TD * grad_TD).sum().backward()
    got = [got_x.grad, *(p.grad for p in moe.parameters())]
    moe.zero_grad()
    want_TD = reference_moe(moe, want_x)
    (want_TD * grad_TD).sum().backward()
    want = [want_x.grad, *(p.grad for p in moe.parameters())]

    torch.testing.assert_close(out_TD, want_TD, rtol=1e-5, atol=1e-6)
    for got_grad, want_grad in zip(got, want, strict=True):
        assert want_grad is not None and want_grad.abs().max() > 0
        torch.testing.assert_close(got_grad, want_grad, rtol=1e-4, atol=1e-5)


def test_expert_runs_are_whole_blocks_in_expert_order() -> None:
    ids_TK = torch.tensor([[2, 0]] * (BLOCK_ROWS + 1) + [[0, 3]] * 3)

    row_KT, source_P, runs, load_E = expert_runs(ids_TK, 5)

    assert load_E.tolist() == [BLOCK_ROWS + 4, 0, BLOCK_ROWS + 1, 3, 0]
    ends = [(run.start, run.stop) for run in runs]
    assert ends == [
        (block * BLOCK_ROWS, end * BLOCK_ROWS)
        for block, end in [(0, 2), (2, 2), (2, 4), (4, 5), (5, 5)]
    ]
    for k in range(2):
        for token, row in enumerate(row_KT[k].tolist()):
            run = runs[ids_TK[token, k]]
            assert run.start <= row < run.stop
            assert source_P[row] == token
    assert row_KT.unique().numel() == ids_TK.numel()


def test_rms_norm_and_its_gradients() -> None:
    want_x, want_weight = tokens(3, 5, 16).requires_grad_(), tokens(16, seed=1).requires_grad_()
    x, weight = (y.detach().float().requires_grad_() for y in (want_x, want_weight))
    grad = tokens(3, 5, 16, seed=2)

    got = RMSNormFunction.apply(x, weight, 1e-2)
    assert isinstance(got, torch.Tensor)
    want = F.rms_norm(want_x, (16,), want_weight, 1e-2)
    (got * grad).sum().backward()
    (want * grad).sum().backward()

    for mine, reference in [(got, want), (x.grad, want_x.grad), (weight.grad, want_weight.grad)]:
        assert mine is not None and reference is not None
        torch.testing.assert_close(mine.double(), reference, rtol=1e-5, atol=1e-5)


def test_token_losses_and_their_gradients_over_several_chunks() -> None:
    logits = (5 * tokens(300, 40)).float().requires_grad_()
    want_logits = logits.detach().clone().requires_grad_()
    targets = torch.arange(300) % 40
    weights = tokens(300, seed=3).float()

    got = TokenLosses.apply(logits, targets)
    assert isinstance(got, torch.Tensor)
    want = F.cross_entropy(want_logits, targets, reduction="none")
    (got * weights).sum().backward()
    (want * weights).sum().backward()

    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.grad, want_logits.grad, rtol=1e-4, atol=1e-6)


def test_muon_moves_every_matrix_by_its_own_orthogonalised_gradient() -> None:
    """Matrices of one shape share a batch; each must get its own update, halves apart."""
    shapes = [(12, 8), (8, 12), (12, 8), (3, 2 * 6, 8), (3, 8, 6)]
    params = [torch.nn.Parameter(tokens(*shape, seed=i).float()) for i, shape in enumerate(shapes)]
    before = [p.detach().clone() for p in params]
    for i, p in enumerate(params):
        p.grad = tokens(*p.shape, seed=20 + i).float()

    Muon(params, lr=0.1, momentum=0.0, weight_decay=0.5, dtype=torch.float32).step()

    for p, old in zip(params, before, strict=True):
        assert p.grad is not None
        halves = p.grad.unflatten(-2, (2, -1)) if p.ndim == 3 else p.grad[None]
        matrices = halves.flatten(0, -3)
        alone = torch.stack([orthogonalise(m[None], torch.float32)[0] for m in matrices])
        scale = 0.2 * max(matrices.shape[-2:]) ** 0.5
        want = old * (1 - 0.1 * 0.5) - 0.1 * scale * alone.reshape_as(old)
        torch.testing.assert_close(p.detach(), want, rtol=1e-5, atol=1e-6)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    for shape in [(4, 12, 8), (4, 8, 12)]:
        values = torch.linalg.svdvals(orthogonalise(tokens(*shape).float(), torch.float32))
        assert values.min() > 0.5
        assert values.max() < 1.3
