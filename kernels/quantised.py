"""Expert weights as integers of 4 or 8 bits, and the gated FFN of every expert on them.

A weight is (q - zero) * scale. q is an unsigned integer of 4 or 8 bits; `group` consecutive input
columns of an output share a scale and, in asymmetric schemes, a zero point; in symmetric schemes
the zero point is the middle of the range, 8 or 128. The last group of a row is shorter where the
columns do not divide.

The layout is the one that the compiled CPU kernels read as one stream. A word of 32 bits holds
consecutive columns of one output, eight of 4 bits or four of 8, the first in the lowest bits;
sixteen outputs at a time lie together as a panel, word by word:

    packed_ePCN[e, p, c, n] >> 4 * j & 15    is q of output 16 p + n, column 8 c + j, of expert e

Outputs are padded to whole panels and columns to whole words, with zeros that no product reads.
The compiled kernels take float32 rows: few rows of an expert read nothing but the packed bytes,
many share a panel that is dequantised once. A row's result does not depend on the others, bit for
bit. On CUDA a Triton kernel dequantises on the way (`grouped_low_bit.py`). Elsewhere, and on the
CPU in other dtypes, one expert at a time is dequantised into x's dtype.

Legend: e experts, O outputs, I input columns, G groups of a row, P panels, N = 16 outputs of a
panel, C words of a row, R rows, D model dim, F expert hidden dim.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from engine.ops import native
from engine.ops.grouped_low_bit import grouped_ffn_low_bit_reference, low_bit_ffn

PANEL = 16  # outputs of a panel, as in csrc/kernels.h
# An int4 group's largest weight in steps of its scale: quantise takes the best for each group.
_STEPS = (7.0, 7.5, 8.0, 8.5, 9.0)
_MOST_WEIGHTS = 1 << 22  # quantised at a time: bounds the temporary memory


@dataclass(frozen=True, slots=True)
class QuantisedWeights:
    """Matrices [e, O, I] in the layout above."""

    bits: int  # 8 or 4
    group: int  # columns that share a scale and a zero point; a whole row at most
    outputs: int  # O
    inputs: int  # I
    packed_ePCN: torch.Tensor  # int32
    scale_ePGN: torch.Tensor  # float32
    zero_ePGN: torch.Tensor | None = None  # float32; None: symmetric

    @property
    def format(self) -> Literal["int"]:
        """What the bits of a weight are."""
        return "int"

    @property
    def num_experts(self) -> int:
        """How many matrices there are."""
        return self.packed_ePCN.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory of words, scales and zero points."""
        tensors = (self.packed_ePCN, self.scale_ePGN, self.zero_ePGN)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def dequantised(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix [O, I] of one expert."""
        return dequantise(self, expert, dtype)


def num_bytes(experts: int, outputs: int, inputs: int, bits: int, group: int = 32) -> int:
    """Return the memory that `quantise` will need for matrices of these sizes."""
    group = _checked_group(bits, group, inputs)
    panels, words = -(-outputs // PANEL), -(-inputs // (32 // bits))
    return experts * panels * PANEL * 4 * (words + -(-inputs // group))


def quantise(weights_eOI: torch.Tensor, bits: int, group: int = 32) -> QuantisedWeights:
    """Return weights rounded to the nearest of 16 (symmetric int4) or 255 (int8) values per group.

    int4: the scale of a group is the one of a few candidates that leaves the least squared error;
    each puts the largest weight on another step and is then fitted to the rounded weights.

    Args:
        weights_eOI: any float dtype, on any device. Not changed.
        bits: 8 or 4.
        group: columns that share a scale, a multiple of 8; from I on a whole row.

    Raises:
        ValueError: bits or group that there are none of, or weights that are not finite.
    """
    experts, outputs, inputs = weights_eOI.shape
    group = _checked_group(bits, group, inputs)
    if experts == 0:
        scale_eOG = torch.empty(0, outputs, -(-inputs // group), device=weights_eOI.device)
        return pack(weights_eOI.to(torch.uint8), scale_eOG, None, bits, group)
    packed, scale = [], []
    rows = max(PANEL, _MOST_WEIGHTS // max(1, inputs) // PANEL * PANEL)
    for weights_OI in weights_eOI:
        parts = [_quantise_rows(part, bits, group) for part in weights_OI.split(rows)]
        whole = pack(
            torch.cat([q_OI for q_OI, _ in parts])[None],
            torch.cat([scale_OG for _, scale_OG in parts])[None],
            None,
            bits,
            group,
        )
        packed.append(whole.packed_ePCN)
        scale.append(whole.scale_ePGN)
    return QuantisedWeights(bits, group, outputs, inputs, torch.cat(packed), torch.cat(scale))


def pack(
    q_eOI: torch.Tensor,
    scale_eOG: torch.Tensor,
    zero_eOG: torch.Tensor | None,
    bits: int,
    group: int,
) -> QuantisedWeights:
    """Return weights that are integers already in the layout above.

    Args:
        q_eOI: integers from 0 to 2^bits - 1, any integer dtype.
        scale_eOG: any float dtype; becomes float32.
        zero_eOG: of the scale's shape, any dtype; None where it is 2^(bits - 1) everywhere.
        bits: 8 or 4.
        group: columns that share a scale, a multiple of 8; from I on a whole row.

    Raises:
        ValueError: bits or group that there are none of, or shapes that do not fit.
    """
    experts, outputs, inputs = q_eOI.shape
    group = _checked_group(bits, group, inputs)
    expected = (experts, outputs, -(-inputs // group))
    for name, tensor in (("scale_eOG", scale_eOG), ("zero_eOG", zero_eOG)):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)}; weights {tuple(q_eOI.shape)} in groups of "
                f"{group} columns need {expected}"
            )
    columns = 32 // bits  # of a word
    padded = F.pad(q_eOI.int(), (0, -inputs % columns))
    q_eOCj = padded.view(experts, outputs, -(-inputs // columns), columns)
    packed_eOC = q_eOCj[..., 0].clone()
    for j in range(1, columns):
        packed_eOC |= q_eOCj[..., j] << bits * j
    return QuantisedWeights(
        bits,
        group,
        outputs,
        inputs,
        to_panels(packed_eOC),
        to_panels(scale_eOG.float()),
        None if zero_eOG is None else to_panels(zero_eOG.float()),
    )


def to_panels(rows_eOC: torch.Tensor) -> torch.Tensor:
    """Return words or scales of each output as panels [e, P, C, N]; zeros fill the last one."""
    experts, outputs, length = rows_eOC.shape
    padded = F.pad(rows_eOC, (0, 0, 0, -outputs % PANEL))
    panels = padded.view(experts, -(-outputs // PANEL), PANEL, length)
    return panels.transpose(2, 3).contiguous()


def unpack(packed_ePCN: torch.Tensor, bits: int, outputs: int, inputs: int) -> torch.Tensor:
    """Return the unsigned integers of panels of words: int32 [e, O, I]."""
    shifts_j = torch.arange(0, 32, bits, dtype=torch.int32, device=packed_ePCN.device)
    q_ePNCj = (packed_ePCN.transpose(2, 3).unsqueeze(-1) >> shifts_j) & (2**bits - 1)
    return q_ePNCj.flatten(3).flatten(1, 2)[:, :outputs, :inputs]


def dequantise(
    weights: QuantisedWeights, expert: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return (q - zero) * scale, rounded to dtype from float32: [e, O, I], of one expert [O, I]."""
    if expert is not None:
        one = slice(expert, expert + 1)
        zero_ePGN = None if weights.zero_ePGN is None else weights.zero_ePGN[one]
        tensors = (weights.packed_ePCN[one], weights.scale_ePGN[one], zero_ePGN)
        sizes = (weights.bits, weights.group, weights.outputs, weights.inputs)
        return dequantise(QuantisedWeights(*sizes, *tensors), None, dtype)[0]
    bits = weights.bits
    q_eOI = unpack(weights.packed_ePCN, bits, weights.outputs, weights.inputs).float()
    if weights.zero_ePGN is None:
        q_eOI -= 2.0 ** (bits - 1)
    else:
        q_eOI -= _by_column(weights.zero_ePGN, weights)
    return q_eOI.mul_(_by_column(weights.scale_ePGN, weights)).to(dtype)


def grouped_ffn_quantised(
    x_RD: torch.Tensor,
    w13_e2FD: QuantisedWeights,
    w2_eDF: QuantisedWeights,
    counts_e: list[int],
    out_RD: torch.Tensor | None = None,
    index_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """`grouped_ffn` with quantised weights: the same arguments, the same order of rows."""
    if native.serves(x_RD, w13_e2FD.scale_ePGN):
        return torch.ops.lockstep_cpu.grouped_ffn_quantised(
            x_RD, *_native(w13_e2FD), *_native(w2_eDF), counts_e, out_RD, index_R
        )
    return low_bit_ffn(x_RD, w13_e2FD, w2_eDF, counts_e, out_RD, index_R)


def grouped_ffn_quantised_reference(
    x_RD: torch.Tensor,
    w13_e2FD: QuantisedWeights,
    w2_eDF: QuantisedWeights,
    counts_e: list[int],
    out_RD: torch.Tensor | None = None,
    index_R: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain torch form of `grouped_ffn_quantised`: dequantises one expert at a time."""
    return grouped_ffn_low_bit_reference(x_RD, w13_e2FD, w2_eDF, counts_e, out_RD, index_R)


def _native(weights: QuantisedWeights) -> tuple[torch.Tensor | list[int] | None, ...]:
    """Weights as the compiled kernel takes them."""
    sizes = [weights.bits, weights.group, weights.outputs, weights.inputs]
    return weights.packed_ePCN, weights.scale_ePGN, weights.zero_ePGN, sizes


def _checked_group(bits: int, group: int, inputs: int) -> int:
    if bits not in (4, 8):
        raise ValueError(f"bits={bits}: quantised weights have 4 or 8")
    if group <= 0 or (group % 8 and group < inputs):
        raise ValueError(f"group={group}: must be a multiple of 8 or the whole row ({inputs})")
    return min(group, inputs)


def _quantise_rows(
    weights_OI: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q [O, I] and scales [O, G] of some rows."""
    outputs, inputs = weights_OI.shape
    # Zeros that fill the last group change neither its largest weight nor its error.
    padded = F.pad(weights_OI.float(), (0, -inputs % group)).view(outputs, -1, group)
    largest, at = padded.abs().max(dim=2, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError("weights_eOI: has values that are not finite; they cannot be quantised")
    middle = 2 ** (bits - 1)
    if bits == 8:
        scale = largest / 127
        q = (padded / scale.where(scale > 0, 1.0)).round_()
    else:
        q, scale = _best_of_candidates(padded, padded.gather(2, at))
    q_OI = (q + middle).to(torch.uint8).view(outputs, -1)[:, :inputs]
    return q_OI, scale.squeeze(2)


def _best_of_candidates(
    padded: torch.Tensor, largest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q from -8 to 7 and the scale of each group with the least squared error."""
    best_error = torch.full_like(largest, torch.inf)
    best_q, best_scale = torch.zeros_like(padded), torch.zeros_like(largest)
    for steps in _STEPS:
        # The sign of the scale lets the largest weight take -8, which +7 does not reach.
        scale = largest / -steps
        q = (padded / scale.where(scale != 0, 1.0)).round_().clamp_(-8, 7)
        scale = (padded * q).sum(2, keepdim=True) / (q * q).sum(2, keepdim=True).clamp_(min=1.0)
        error = (q * scale - padded).square_().sum(2, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_q = torch.where(better, q, best_q)
    return best_q, best_scale


def _by_column(scale_ePGN: torch.Tensor, weights: QuantisedWeights) -> torch.Tensor:
    """[e, P, G, N] as [e, O, I]: each scale for its columns."""
    scale_eOG = scale_ePGN.transpose(2, 3).flatten(1, 2)[:, : weights.outputs]
    # Not repeat_interleave: where its sizes are not known it makes the host wait for a GPU.
    scale_eOGg = scale_eOG.unsqueeze(-1).expand(-1, -1, -1, weights.group)
    return scale_eOGg.flatten(2)[:, :, : weights.inputs]
