"""The gated FFN of every local expert over its rows, which lie grouped by expert or anywhere.

The compiled CPU kernel reads every weight once a wave of rows and spreads strips of weights over
the cores, so that one row an expert keeps all of them busy as well as a thousand do. Its result for
a row does not depend on the others, bit for bit.

Legend: R rows received, D model dim, F expert hidden dim, e experts on this rank.
"""

import torch
import torch.nn.functional as F

from engine.ops import native
from engine.ops.panels import in_panels


def grouped_ffn(
    x_RD: torch.Tensor,
    w13_e2FD: torch.Tensor,
    w2_eDF: torch.Tensor,
    counts_e: list[int],
    out_RD: torch.Tensor | None = None,
    index_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns (silu(x w1^T) * (x w3^T)) w2^T of each row's expert: [R, D] in x's dtype, each result
    where its row lies in x.

    x_RD [R, D] holds counts_e[0] rows of local expert 0, then counts_e[1] of expert 1, and so on
    (sum(counts_e) == R, zeros allowed). index_R (int64 [R], each of 0 .. R - 1 once): x_RD[index_R]
    has that order instead, and nothing is moved to make it. It may name some of the rows
    (sum(counts_e) of them, each once): results of the others are left as they are in out_RD.
    w13_e2FD [e, 2F, D]: w1 is the first F rows, w3 the other F. w2_eDF is [e, D, F]. Both may be in
    panels (`panels.py`): w13_e2FD each half by itself. Both may be bfloat16 where x is float32
    (`native.py` says what is rounded).
    out_RD: where to write the result, x's shape and dtype, not x itself; a new tensor by default.
    """
    panels = in_panels(w13_e2FD)
    assert panels == in_panels(w2_eDF), "both weights in panels, or none"
    if native.serves(x_RD) and native.serves_weights(w13_e2FD, w2_eDF):
        return torch.ops.lockstep_cpu.grouped_ffn(
            x_RD, w13_e2FD, w2_eDF, counts_e, out_RD, panels, index_R
        )
    assert not panels, "weights in panels are for the compiled kernels alone"
    return grouped_ffn_reference(x_RD, w13_e2FD, w2_eDF, counts_e, out_RD, index_R)


def grouped_ffn_reference(
    x_RD: torch.Tensor,
    w13_e2FD: torch.Tensor,
    w2_eDF: torch.Tensor,
    counts_e: list[int],
    out_RD: torch.Tensor | None = None,
    index_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain torch form of `grouped_ffn`: a loop over experts."""
    y_RD = torch.empty_like(x_RD) if out_RD is None else out_RD
    start = 0
    for expert, count in enumerate(counts_e):
        if count == 0:
            continue
        rows = slice(start, start + count)
        if index_R is not None:
            rows = index_R[rows]
        gate_CF, up_CF = F.linear(x_RD[rows], w13_e2FD[expert].to(x_RD.dtype)).chunk(2, dim=-1)
        y_RD[rows] = F.linear(F.silu(gate_CF) * up_CF, w2_eDF[expert].to(x_RD.dtype))
        start += count
    return y_RD
