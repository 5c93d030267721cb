"""The product of rows grouped by expert with low-bit weights, dequantised on the way, for CUDA.

Two launches of it and one of silu_and_mul are the gated FFN of all experts, however many have rows;
biases are added in the product, and other forms of experts have other activations between. Rows are
read, or results written, where an index says, so that nothing is moved beforehand. The
host knows the counts and lists the tiles, (expert, first row, end of its rows), in one small copy.

Legend: R rows, I input columns, O outputs, T tiles, D model dim, F expert hidden dim, N 2F, without
a gate F, e experts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.ops import triton_support
from engine.ops.expert_activation import Rule, activate, activate_reference
from engine.ops.low_bit_weights import LowBitWeights
from engine.ops.to_device import to_device

# Rows of a tile. tl.dot takes at least 16, and more would multiply nothing where experts have few;
# of more rows every tile dequantises the weights again. Two heights only: each is compiled.
_FEW, _MANY = 16, 64
# Rows of one expert of which each height is taken: what is compiled before the first step.
ROWS_OF_HEIGHTS = (1, 2 * _FEW + 1)


class Between(NamedTuple):
    """What experts compute beside their two products; the default is plain SwiGLU."""

    rule: Rule = Rule("silu", True, None, 0.0)
    b13_eN: torch.Tensor | None = None  # added to the first product
    b2_eD: torch.Tensor | None = None  # added to the second


_PLAIN = Between()


def row_tiles(counts_e: list[int]) -> tuple[torch.Tensor, int]:
    """Return the tiles of rows grouped by expert, and how many rows a tile has at most.

    Args:
        counts_e: rows per expert.

    Returns:
        int32 [T, 3] on the host: expert, first row, end of the expert's rows.
    """
    height = _FEW if max(counts_e, default=0) <= 2 * _FEW else _MANY
    tiles, start = [], 0
    for expert, count in enumerate(counts_e):
        end = start + count
        tiles += [(expert, first, end) for first in range(start, end, height)]
        start = end
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 3), height


def grouped_low_bit_reference(
    x_RI: torch.Tensor,
    weights: LowBitWeights,
    tiles_T3: torch.Tensor,
    height: int,
    out_RO: torch.Tensor,
    index_R: torch.Tensor | None = None,
    *,
    scatter: bool = False,
    bias_eO: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain torch form of `grouped_low_bit_triton` (`gpu/grouped_low_bit.py`): x W^T of each row's
    expert, and its bias.

    Args:
        x_RI: rows, any float dtype.
        weights: of all experts.
        tiles_T3: of `row_tiles`, on x's device.
        height: of `row_tiles`.
        out_RO: where to write; rows of no tile are left as they are.
        index_R: int64 [R]; row r of a tile is x_RI[index_R[r]], or with `scatter` its result
            out_RO[index_R[r]].
        scatter: index_R says where results go, not where rows are.
        bias_eO: any float dtype; None: none.

    Returns:
        out_RO.
    """
    runs: dict[int, tuple[int, int]] = {}  # rows of an expert at once: torch's sums depend on it
    for expert, first, end in tiles_T3.tolist():  # SYNC: the plain form, for tests
        runs[expert] = runs.get(expert, (first, end))[0], min(first + height, end)
    for expert, run in runs.items():
        rows = slice(*run)
        listed = rows if index_R is None else index_R[rows]
        source, target = (rows, listed) if scatter else (listed, rows)
        weights_OI = weights.dequantised(expert, x_RI.dtype)
        bias_O = None if bias_eO is None else bias_eO[expert].to(x_RI.dtype)
        out_RO[target] = F.linear(x_RI[source], weights_OI, bias_O)
    return out_RO


def low_bit_ffn(
    x_RD: torch.Tensor,
    w13_eND: LowBitWeights,
    w2_eDF: LowBitWeights,
    counts_e: list[int],
    out_RD: torch.Tensor | None = None,
    index_R: torch.Tensor | None = None,
    between: Between = _PLAIN,
) -> torch.Tensor:
    """`grouped_ffn` with low-bit weights of any format and experts of any form: the same arguments,
    the same order of rows.
    """
    serves = triton_support.serves(x_RD)
    ffn = grouped_ffn_low_bit if serves else grouped_ffn_low_bit_reference
    return ffn(x_RD, w13_eND, w2_eDF, counts_e, out_RD, index_R, between)


def grouped_ffn_low_bit(
    x_RD: torch.Tensor,
    w13_eND: LowBitWeights,
    w2_eDF: LowBitWeights,
    counts_e: list[int],
    out_RD: torch.Tensor | None = None,
    index_R: torch.Tensor | None = None,
    between: Between = _PLAIN,
) -> torch.Tensor:
    """`low_bit_ffn` on CUDA."""
    from engine.ops.gpu.grouped_low_bit import grouped_low_bit_triton

    y_RD = torch.empty_like(x_RD) if out_RD is None else out_RD
    num_rows = sum(counts_e)
    if num_rows == 0:
        return y_RD
    tiles, height = row_tiles(counts_e)
    tiles_T3 = to_device(tiles, x_RD.device)
    hidden_RN = x_RD.new_empty(num_rows, w13_eND.outputs)
    grouped_low_bit_triton(
        x_RD, w13_eND, tiles_T3, height, hidden_RN, index_R, bias_eO=between.b13_eN
    )
    hidden_RF = activate(hidden_RN, between.rule)
    return grouped_low_bit_triton(
        hidden_RF, w2_eDF, tiles_T3, height, y_RD, index_R, scatter=True, bias_eO=between.b2_eD
    )


def grouped_ffn_low_bit_reference(
    x_RD: torch.Tensor,
    w13_eND: LowBitWeights,
    w2_eDF: LowBitWeights,
    counts_e: list[int],
    out_RD: torch.Tensor | None = None,
    index_R: torch.Tensor | None = None,
    between: Between = _PLAIN,
) -> torch.Tensor:
    """Plain torch form of `low_bit_ffn`: dequantises one expert at a time."""
    y_RD = torch.empty_like(x_RD) if out_RD is None else out_RD
    rule, *biases = between
    start = 0
    for expert, count in enumerate(counts_e):
        if count == 0:
            continue
        rows = slice(start, start + count)
        if index_R is not None:
            rows = index_R[rows]
        b13_N, b2_D = (None if bias is None else bias[expert].to(x_RD.dtype) for bias in biases)
        hidden_CN = F.linear(x_RD[rows], w13_eND.dequantised(expert, x_RD.dtype), b13_N)
        hidden_CF = activate_reference(hidden_CN, rule)
        y_RD[rows] = F.linear(hidden_CF, w2_eDF.dequantised(expert, x_RD.dtype), b2_D)
        start += count
    return y_RD
