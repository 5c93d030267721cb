"""The MoE layer of bench_moe_layer.py: weights, tokens and the expected output in float64.

Tokens are made from a table of chosen experts, so that a load, even or skewed, is exact and every
implementation must route alike: gate rows are orthonormal, so a token's logits can be set at will.
A load generator is one function in `LOADS`.

Legend: T tokens, D model dim, F expert hidden dim, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# (num_tokens, num_experts, top_k, generator) -> topk_ids_TK, int64, distinct in a row, best first
Load = Callable[[int, int, int, torch.Generator], torch.Tensor]


def uniform(
    num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator
) -> torch.Tensor:
    """Return the experts of every token, drawn at random with equal probability."""
    scores_TE = torch.rand(num_tokens, num_experts, generator=generator)
    return scores_TE.argsort(1, descending=True)[:, :top_k]


LOADS: dict[str, Load] = {"uniform": uniform}


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEShape:
    """Sizes of the layer; float32 gated experts as in Mixtral."""

    hidden: int = 512
    ffn: int = 1024
    experts: int = 8
    top_k: int = 2

    def flops(self, tokens: int) -> int:
        """Return floating-point operations of the experts' three matrix products."""
        return 2 * 3 * self.hidden * self.ffn * self.top_k * tokens

    @property
    def weight_bytes(self) -> int:
        """Bytes of all experts' weights in float32."""
        return 3 * self.hidden * self.ffn * self.experts * 4


@dataclass(frozen=True, slots=True)
class MoEWeights:
    """Weights of one layer, float32."""

    gate_ED: torch.Tensor  # orthonormal rows
    w13_E2FD: torch.Tensor  # gate rows first
    w2_EDF: torch.Tensor


def make_weights(shape: MoEShape, seed: int = 0) -> MoEWeights:
    """Return seeded weights, scaled so that activations keep their size.

    Raises:
        ValueError: more experts than model dims, so that no orthonormal gate exists.
    """
    if shape.experts > shape.hidden:
        raise ValueError(f"--experts {shape.experts}: must be at most --hidden {shape.hidden}")
    random = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=random) * sizes[-1] ** -0.5

    gate_DE, _ = torch.linalg.qr(torch.randn(shape.hidden, shape.experts, generator=random))
    return MoEWeights(
        gate_DE.T.contiguous(),
        normal(shape.experts, 2 * shape.ffn, shape.hidden),
        normal(shape.experts, shape.hidden, shape.ffn),
    )


def make_ids(shape: MoEShape, tokens: int, load: str, seed: int = 0) -> torch.Tensor:
    """Return the experts each token must choose: topk_ids_TK."""
    random = torch.Generator().manual_seed(seed + tokens)
    return LOADS[load](tokens, shape.experts, shape.top_k, random)


def make_tokens(weights: MoEWeights, topk_ids_TK: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return tokens x_TD that the gate routes to `topk_ids_TK`, in order, by clear margins."""
    num_tokens, top_k = topk_ids_TK.shape
    num_experts, hidden = weights.gate_ED.shape
    random = torch.Generator().manual_seed(seed + 1)
    noise_TD = torch.randn(num_tokens, hidden, generator=random)
    logits_TE = 0.1 * torch.rand(num_tokens, num_experts, generator=random)
    chosen_TK = (4.0 - 0.25 * torch.arange(top_k)).expand(num_tokens, top_k)
    logits_TE.scatter_(1, topk_ids_TK, chosen_TK)
    gate_ED = weights.gate_ED
    return noise_TD - (noise_TD @ gate_ED.T) @ gate_ED + logits_TE @ gate_ED


def vary_margins(x_TD: torch.Tensor, seed: int = 0) -> None:
    """Make the router surer of some tokens than of others, in place, or every score would tie."""
    random = torch.Generator().manual_seed(seed)
    x_TD *= 0.75 + 0.5 * torch.rand(len(x_TD), 1, generator=random)


def reference(weights: MoEWeights, x_TD: torch.Tensor, topk_ids_TK: torch.Tensor) -> torch.Tensor:
    """Return the layer's output [T, D] in float64: softmax over chosen logits, as Mixtral."""
    x_TD, gate_ED = x_TD.double(), weights.gate_ED.double()
    logits_TK = (x_TD @ gate_ED.T).gather(1, topk_ids_TK)
    gates_TK = logits_TK.softmax(-1)
    out_TD = torch.zeros_like(x_TD)
    for expert in range(gate_ED.shape[0]):
        token_N, k_N = (topk_ids_TK == expert).nonzero(as_tuple=True)
        gate_NF, up_NF = (x_TD[token_N] @ weights.w13_E2FD[expert].double().T).chunk(2, -1)
        rows_ND = (F.silu(gate_NF) * up_NF) @ weights.w2_EDF[expert].double().T
        out_TD.index_add_(0, token_N, gates_TK[token_N, k_N, None] * rows_ND)
    return out_TD


def share(total: int, ranks: int, rank: int) -> slice:
    """Return `rank`'s part of `total` items: contiguous, the remainder to the first ranks."""
    quotient, remainder = divmod(total, ranks)
    start = rank * quotient + min(rank, remainder)
    return slice(start, start + quotient + (rank < remainder))
