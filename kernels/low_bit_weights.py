"""What low-bit weights are to a product: panels of words, scales, and how bits become a number.

`quantised.py` has integers, `low_bit_floats.py` MXFP4 and FP8.

Legend: e experts, O outputs, I input columns, P panels of 16 outputs, C words of a row, G groups of
a row, N outputs of a panel.
"""

from typing import Literal, Protocol

import torch


class PackedWeights(Protocol):
    """Matrices [e, O, I] as a kernel reads them; the layout is that of `quantised.py`."""

    @property
    def format(self) -> Literal["int", "mxfp4", "fp8"]:
        """What the bits of a weight are."""
        ...

    @property
    def bits(self) -> int:
        """Bits of a weight, 4 or 8."""
        ...

    @property
    def group(self) -> int:
        """Columns that share a scale; a whole row at most."""
        ...

    @property
    def outputs(self) -> int:
        """O."""
        ...

    @property
    def inputs(self) -> int:
        """I."""
        ...

    @property
    def packed_ePCN(self) -> torch.Tensor:
        """Words, int32."""
        ...

    @property
    def scale_ePGN(self) -> torch.Tensor:
        """Scales, N is 16, or 1 where the outputs of a panel share them."""
        ...

    @property
    def zero_ePGN(self) -> torch.Tensor | None:
        """Zero points, where the format has any."""
        ...


class LowBitWeights(PackedWeights, Protocol):
    """Weights that the plain form can dequantise too."""

    def dequantised(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix [O, I] of one expert."""
        ...
