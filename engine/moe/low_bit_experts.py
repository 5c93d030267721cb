"""Low-bit experts: a rank's experts of one layer held as integers, and the product that runs them.

They are quantised while they are loaded, row by row, so there is never memory for their values:
`rows` is what a `WeightSlot` fills. Integers of a checkpoint are kept as they are where the layouts
say so.

Legend: R rows, D model dim, F expert hidden dim, e experts, O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from engine.ops.quantised import (
    QuantisedWeights,
    dequantise,
    grouped_ffn_quantised,
    pack,
    quantise,
)
from engine.ops.quantised_rows import IntegerLayout, empty_quantised, parts_of, set_rows
from engine.ops.to_device import to_device

Matrix = Literal["w13", "w2"]
# Quantised at a time: what that takes stays with the allocator, once per thread that reads.
_MOST_WEIGHTS = 1 << 19


@dataclass(frozen=True, slots=True)
class ExpertLayouts:
    """How the experts of a layer are held as integers."""

    w13: IntegerLayout
    w2: IntegerLayout
    kept: bool = False  # a checkpoint's own integers

    @classmethod
    def of_bits(cls, bits: int, group: int) -> ExpertLayouts:
        """Return symmetric integers of so many bits."""
        return cls(IntegerLayout(bits, group), IntegerLayout(bits, group))

    @property
    def bits(self) -> int:
        """Bits of the matrix that has more of them."""
        return max(self.w13.bits, self.w2.bits)


class LowBitExperts:
    """Stacked experts as integers; an `ExpertsBackend`.

    Args:
        num_local: e.
        hidden, ffn: D and F.
        layouts: of the matrices.
        device: of the weights.
        dtype: of the values that they are made from.
        source: of copies whose homes are held as integers too: how, so that a copy is made from
            what its home holds; None: from the values as they are.
    """

    name = "quantised"
    takes_some_rows = True

    def __init__(
        self,
        num_local: int,
        hidden: int,
        ffn: int,
        layouts: ExpertLayouts,
        device: torch.device,
        dtype: torch.dtype,
        source: ExpertLayouts | None = None,
    ) -> None:
        self.layouts, self.dtype = layouts, dtype
        self.w13_e2FD = empty_quantised(layouts.w13, num_local, 2 * ffn, hidden, device)
        self.w2_eDF = empty_quantised(layouts.w2, num_local, hidden, ffn, device)
        self.source = source

    @property
    def bytes_per_expert(self) -> int:
        """Bytes of one expert's weights."""
        found = 0
        for weights in (self.w13_e2FD, self.w2_eDF):
            scales, words = weights.scale_ePGN[:1], weights.packed_ePCN.shape[1:].numel()
            per_scale = 1 if weights.zero_ePGN is None else 2
            found += 4 * (words + per_scale * scales.shape[1:].numel())
        return found

    def parts(self, local: int) -> list[torch.Tensor]:
        """Return the tensors that one expert consists of, as views."""
        return [*parts_of(self.w13_e2FD, local), *parts_of(self.w2_eDF, local)]

    def values(self, local: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's weights in float32, w13 [2F, D] and w2 [D, F]."""
        return dequantise(self.w13_e2FD, local), dequantise(self.w2_eDF, local)

    def rows(self, matrix: Matrix, local: int, first: int, count: int) -> SinkOfRows:
        """Return the sink of rows [first, first + count) of one expert's matrix."""
        weights = self.w13_e2FD if matrix == "w13" else self.w2_eDF
        source = None if self.source is None else getattr(self.source, matrix)
        return SinkOfRows(weights, local, first, count, source, self.layouts.kept)

    def finalize_weights(self) -> None:
        """Do nothing: the weights were brought into their layout as they were loaded."""

    def __call__(
        self,
        rows_RD: torch.Tensor,
        expert_counts: list[int],
        out_RD: torch.Tensor | None = None,
        index_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the experts; see `ExpertsBackend`."""
        return grouped_ffn_quantised(
            rows_RD, self.w13_e2FD, self.w2_eDF, expert_counts, out_RD, index_R
        )


class SinkOfRows:
    """Rows of one expert's matrix, quantised as they arrive; a `RowSink`."""

    def __init__(
        self,
        weights: QuantisedWeights,
        local: int,
        first: int,
        count: int,
        source: IntegerLayout | None,
        keeps_integers: bool,
    ) -> None:
        self._weights, self._local, self._first, self._source = weights, local, first, source
        self.keeps_integers = keeps_integers
        self.shape = (count, weights.inputs)
        self.device = weights.scale_ePGN.device
        scales_of = 1 if weights.zero_ePGN is None else 2
        words = 4 * count * weights.packed_ePCN.shape[2]
        self.num_bytes = words + scales_of * 4 * count * weights.scale_ePGN.shape[2]

    def take(self, rows_OI: torch.Tensor) -> None:
        """Quantise all rows, some at a time; see `RowSink`."""
        weights, first = self._weights, self._first
        for part_OI in rows_OI.split(max(1, _MOST_WEIGHTS // max(1, weights.inputs))):
            part_1OI = part_OI[None]
            if self._source is not None:
                part_1OI = dequantise(quantise(part_1OI, self._source.bits, self._source.group))
            made = quantise(part_1OI, weights.bits, weights.group)
            set_rows(weights, self._local, first, made)
            first += len(part_OI)

    def take_integers(
        self,
        first: int,
        q_OI: torch.Tensor,
        scale_OG: torch.Tensor,
        zero_OG: torch.Tensor | None,
    ) -> None:
        """Take some of the rows as integers; see `RowSink`."""
        weights = self._weights
        zero_1OG = None if zero_OG is None else to_device(zero_OG[None], self.device)
        q_1OI, scale_1OG = (to_device(each[None], self.device) for each in (q_OI, scale_OG))
        made = pack(q_1OI, scale_1OG, zero_1OG, weights.bits, weights.group)
        set_rows(weights, self._local, self._first + first, made)
