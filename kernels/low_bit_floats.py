"""Expert weights as floats of 4 bits (MXFP4) or 8 bits (FP8 E4M3).

A weight is a small float times a scale:

    mxfp4   E2M1, and a power of two (E8M0) per 32 columns of an output
    fp8     E4M3, and a float32 per block of outputs and columns, per output, or per matrix

The words lie in the panels of `quantised.py`, eight columns of 4 bits or four of 8 in each.
Scales are [e, P, G, N] likewise; where the outputs of every panel share theirs, as in blocks of
128 x 128, N is 1.

Legend: e experts, O outputs, I input columns, G groups of a row, P panels, N outputs of a panel,
C words of a row, B bytes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from engine.ops.quantised import PANEL, to_panels, unpack

MXFP4_GROUP = 32  # columns that share a scale
_BITS = {"mxfp4": 4, "fp8": 8}
_LARGEST = 448.0  # of E4M3


@dataclass(frozen=True, slots=True)
class FloatWeights:
    """Matrices [e, O, I] in the layout above."""

    format: Literal["mxfp4", "fp8"]
    group: int  # columns that share a scale; a whole row at most
    outputs: int  # O
    inputs: int  # I
    packed_ePCN: torch.Tensor  # int32
    scale_ePGN: torch.Tensor  # uint8 exponents of mxfp4, else float32; N is 16 or 1
    zero_ePGN: None = None  # as QuantisedWeights has it

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return _BITS[self.format]

    @property
    def num_experts(self) -> int:
        """How many matrices there are."""
        return self.packed_ePCN.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory of words and scales."""
        return self.packed_ePCN.nbytes + self.scale_ePGN.nbytes

    def dequantised(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix [O, I] of one expert."""
        return dequantise_floats(self, expert, dtype)


def shares_scales(height: int, outputs: int) -> bool:
    """Return whether the outputs of every panel have the same scales.

    Args:
        height: outputs that share a scale, counted from the first.
        outputs: O.
    """
    return height % PANEL == 0 or height >= outputs


def pack_mxfp4(bytes_eOB: torch.Tensor, scale_eOG: torch.Tensor) -> FloatWeights:
    """Return weights in MXFP4 in the layout above.

    Args:
        bytes_eOB: uint8 [e, O, 16 G], two columns per byte, the first in the low half.
        scale_eOG: exponents of E8M0, as uint8 or float8_e8m0fnu.

    Raises:
        ValueError: shapes that do not fit, or a scale that is NaN.
    """
    scale_eOG = scale_eOG.view(torch.uint8)
    experts, outputs, groups = scale_eOG.shape
    if bytes_eOB.shape != (experts, outputs, groups * MXFP4_GROUP // 2):
        raise ValueError(
            f"bytes_eOB: shape {tuple(bytes_eOB.shape)}; scales {tuple(scale_eOG.shape)} need "
            f"{(experts, outputs, groups * MXFP4_GROUP // 2)}"
        )
    if bool((scale_eOG == 255).any()):  # SYNC: while weights are loaded
        raise ValueError("scale_eOG: 255 is not a number in E8M0")
    words_eOC = bytes_eOB.contiguous().view(torch.int32)
    return FloatWeights(
        "mxfp4",
        MXFP4_GROUP,
        outputs,
        groups * MXFP4_GROUP,
        to_panels(words_eOC),
        to_panels(scale_eOG),
    )


def pack_fp8(
    weights_eOI: torch.Tensor, scale_eOG: torch.Tensor, block: tuple[int, int]
) -> FloatWeights:
    """Return weights in FP8 E4M3 in the layout above.

    Args:
        weights_eOI: float8_e4m3fn, or its bytes as uint8.
        scale_eOG: [e, blocks down, blocks across], any float dtype; becomes float32.
        block: outputs and columns per scale. Columns are a multiple of 4 or at least the row's.

    Raises:
        ValueError: shapes that do not fit, a block of odd width, or a weight that is NaN.
    """
    experts, outputs, inputs = weights_eOI.shape
    height, width = block
    if height < 1 or width < 1 or (width % 4 and width < inputs):
        raise ValueError(f"block={block}: columns must be a multiple of 4, or the row ({inputs})")
    expected = (experts, -(-outputs // height), -(-inputs // width))
    if scale_eOG.shape != expected:
        raise ValueError(
            f"scale_eOG: shape {tuple(scale_eOG.shape)}; weights {tuple(weights_eOI.shape)} in "
            f"blocks of {height} x {width} need {expected}"
        )
    bytes_eOI = weights_eOI.view(torch.uint8)
    if bool(((bytes_eOI & 127) == 127).any()):  # SYNC: while weights are loaded
        raise ValueError("weights_eOI: has values that are not numbers")
    bytes_eOI = F.pad(bytes_eOI, (0, -inputs % 4)).contiguous()
    scale_eOG = scale_eOG.float()
    device = scale_eOG.device
    if shares_scales(height, outputs):
        first_P = torch.arange(0, outputs, PANEL, device=device)
        scale_ePGN = scale_eOG[:, first_P // height].contiguous().unsqueeze(-1)
    else:
        output_O = torch.arange(outputs, device=device)
        scale_ePGN = to_panels(scale_eOG[:, output_O // height])
    words_ePCN = to_panels(bytes_eOI.view(torch.int32))
    return FloatWeights("fp8", min(width, inputs), outputs, inputs, words_ePCN, scale_ePGN)


def quantise_fp8(weights_eOI: torch.Tensor, block: tuple[int, int]) -> FloatWeights:
    """Return weights rounded to the nearest of E4M3; the largest of a block becomes 448.

    Args:
        weights_eOI: any float dtype, on any device. Not changed.
        block: outputs and columns per scale, as `pack_fp8` takes it.

    Raises:
        ValueError: weights that are not finite.
    """
    return pack_fp8(*round_to_blocks(weights_eOI, block), block)


def round_to_blocks(
    weights_eOI: torch.Tensor, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes float8_e4m3fn [e, O, I] and scales [e, blocks down, blocks across] of
    `quantise_fp8`: the same arguments.
    """
    _, outputs, inputs = weights_eOI.shape
    height, width = min(block[0], max(1, outputs)), min(block[1], max(1, inputs))
    padding = (0, -inputs % width, 0, -outputs % height)
    padded = F.pad(weights_eOI.float(), padding)
    blocks = padded.unflatten(2, (-1, width)).unflatten(1, (-1, height))
    scale = blocks.abs().amax(dim=(2, 4), keepdim=True) / _LARGEST
    if not scale.isfinite().all():  # SYNC: while weights are loaded
        raise ValueError("weights_eOI: has values that are not finite; they cannot be quantised")
    # A block of zeros, or of numbers so small that their scale is none.
    values = (blocks / scale.where(scale > 0, 1.0)).clamp_(-_LARGEST, _LARGEST)
    codes_eOI = values.view_as(padded)[:, :outputs, :inputs].to(torch.float8_e4m3fn)
    return codes_eOI.contiguous(), scale[:, :, 0, :, 0]


def dequantise_floats(
    weights: FloatWeights, expert: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return weights times scales, rounded to dtype from float32: [e, O, I], of one expert [O, I].

    Scales of mxfp4 of 2 ** -127 count as 0, as in the kernel.
    """
    experts = slice(None) if expert is None else slice(expert, expert + 1)
    q_eOI = unpack(weights.packed_ePCN[experts], weights.bits, weights.outputs, weights.inputs)
    # Sign, exponent and mantissa, moved, are those of a float16 that is a power of two smaller.
    scale_ePGN = weights.scale_ePGN[experts]
    if weights.format == "mxfp4":
        half_eOI, factor = (q_eOI & 7) << 9 | (q_eOI & 8) << 12, 16384.0
        scale_ePGN = (scale_ePGN.int() << 23).view(torch.float32)
    else:
        half_eOI, factor = (q_eOI & 127) << 7 | (q_eOI & 128) << 8, 256.0
    value_eOI = half_eOI.to(torch.int16).view(torch.float16).float().mul_(factor)
    scale_ePNG = scale_ePGN.transpose(2, 3)
    scale_eOG = scale_ePNG.expand(-1, -1, PANEL, -1).flatten(1, 2)[:, : weights.outputs]
    scale_eOGg = scale_eOG.unsqueeze(-1).expand(-1, -1, -1, weights.group)
    value_eOI = value_eOI.mul_(scale_eOGg.flatten(2)[:, :, : weights.inputs]).to(dtype)
    return value_eOI if expert is None else value_eOI[0]
