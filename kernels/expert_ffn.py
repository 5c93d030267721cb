"""The feed-forward of local experts of any form, expert by expert, with biases and any activation.

`grouped_ffn` is the fast way for plain SwiGLU. Here an expert is two calls of `linear` and one
activation between, so a row's result does not depend on the other rows where `linear`'s does not.

Legend: R rows received, D model dim, F expert hidden dim, e experts on this rank.
"""

from collections.abc import Sequence

import torch

from engine.ops.expert_activation import Rule, activate
from engine.ops.linear import linear

_Biases = Sequence[torch.Tensor] | None


def expert_ffn(
    x_RD: torch.Tensor,
    weights: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
    biases: tuple[_Biases, _Biases],
    rule: Rule,
    counts_e: list[int],
    out_RD: torch.Tensor | None = None,
    index_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns activate(x w13^T + b13) w2^T + b2 of each row's expert: [R, D] in x's dtype, each
    result where its row lies in x.

    weights: w13 of each expert, [2F, D] (w1 before w3) or without a gate [F, D], and w2 [D, F], as
    `linear` takes them. biases: b13 [2F] and b2 [D] of each, or None.
    The other arguments are those of `grouped_ffn`.
    """
    (w13, w2), (b13, b2) = weights, biases
    y_RD = torch.empty_like(x_RD) if out_RD is None else out_RD
    start = 0
    for expert, count in enumerate(counts_e):
        if count == 0:
            continue
        rows = slice(start, start + count)
        if index_R is not None:
            rows = index_R[rows]
        hidden_CN = linear(x_RD[rows], w13[expert], None if b13 is None else b13[expert])
        hidden_CF = activate(hidden_CN, rule)
        y_RD[rows] = linear(hidden_CF, w2[expert], None if b2 is None else b2[expert])
        start += count
    return y_RD
