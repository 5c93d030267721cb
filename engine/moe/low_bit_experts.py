"""Low-bit experts: a rank's experts of one layer held as integers or small floats, and the product
that runs them.

They are quantised while they are loaded, row by row, so there is never memory for their values:
`rows` is what a `WeightSlot` fills. What a checkpoint holds is kept as it is where the layouts say
so.

Legend: R rows, D model dim, F expert hidden dim, N 2F, without a gate F, e experts, O outputs, I
inputs, G groups of a row, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from engine.layers.precision import compute_dtype
from engine.moe.expert_form import ExpertForm
from engine.ops.block_scaled_ffn import MASKED_ROWS, BlockWeights, block_scaled_ffn
from engine.ops.grouped_low_bit import ROWS_OF_HEIGHTS, Between, low_bit_ffn
from engine.ops.quantised import QuantisedWeights, grouped_ffn_quantised, pack
from engine.ops.quantised_rows import (
    FloatLayout,
    IntegerLayout,
    Layout,
    LowBit,
    bytes_of_rows,
    empty_weights,
    pack_floats,
    parts_of,
    round_to,
    set_rows,
    tensors_of,
)
from engine.ops.scaled_ffn import RowWeights, scaled_ffn
from engine.ops.to_device import to_device

Matrix = Literal["w13", "w2"]
FP8_BLOCK = (128, 128)  # of experts that are rounded to FP8
# Quantised at a time: what that takes stays with the allocator, once per thread that reads.
_MOST_WEIGHTS = 1 << 19
_WHOLE_ROW = 1 << 30  # columns, of rows of any length


@dataclass(frozen=True, slots=True)
class ExpertLayouts:
    """How the experts of a layer are held as integers or small floats."""

    w13: Layout
    w2: Layout
    kept: bool = False  # a checkpoint's own

    @classmethod
    def of_bits(cls, bits: int, group: int) -> ExpertLayouts:
        """Return symmetric integers of so many bits."""
        return cls(IntegerLayout(bits, group), IntegerLayout(bits, group))

    @classmethod
    def of_fp8(cls) -> ExpertLayouts:
        """Return FP8 in blocks of `FP8_BLOCK`."""
        return cls(FloatLayout("fp8", FP8_BLOCK), FloatLayout("fp8", FP8_BLOCK))

    @classmethod
    def of_fp8_rows(cls) -> ExpertLayouts:
        """Return FP8 with a scale per output, for the product that rounds rows as well."""
        layout = FloatLayout("fp8", (1, _WHOLE_ROW), in_rows=True)
        return cls(layout, layout)

    @classmethod
    def of_fp8_blocks(cls) -> ExpertLayouts:
        """Return FP8 in blocks of `FP8_BLOCK`, for the product that rounds rows as well."""
        layout = FloatLayout("fp8", FP8_BLOCK, in_rows=True)
        return cls(layout, layout)

    @property
    def backend(self) -> str:
        """The name of what computes on them."""
        if not isinstance(self.w13, FloatLayout) or not self.w13.in_rows:
            return "quantised"
        return "deep_gemm" if self.w13.in_blocks else "scaled_mm"

    @property
    def bits(self) -> int:
        """Bits of the matrix that has more of them."""
        return max(self.w13.bits, self.w2.bits)


class LowBitExperts:
    """Stacked experts in few bits; an `ExpertsBackend`.

    Args:
        num_local: e.
        hidden, ffn: D and F.
        layouts: of the matrices.
        device: of the weights.
        dtype: of the values that they are made from.
        source: of copies whose homes are held in few bits too: how, so that a copy is made from
            what its home holds; None: from the values as they are.
        form: what the experts compute. Biases are uninitialised.
    """

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
        form: ExpertForm = ExpertForm(),  # noqa: B008
    ) -> None:
        self.layouts, self.dtype, self.form = layouts, dtype, form
        self.name = layouts.backend
        inner = form.parts * ffn
        self.w13_eND = empty_weights(layouts.w13, num_local, inner, hidden, device, ffn)
        self.w2_eDF = empty_weights(layouts.w2, num_local, hidden, ffn, device, hidden)
        self.b13_eN = self.b2_eD = None
        if form.bias:
            wide = compute_dtype(dtype, device)
            self.b13_eN = torch.empty(num_local, inner, device=device, dtype=wide)
            self.b2_eD = torch.empty(num_local, hidden, device=device, dtype=wide)
        self.source, self._ffn = source, ffn
        self._between = Between(form.rule, self.b13_eN, self.b2_eD)

    @property
    def bytes_per_expert(self) -> int:
        """Bytes of one expert's weights."""
        biases = [bias for bias in (self.b13_eN, self.b2_eD) if bias is not None]
        held = [*tensors_of(self.w13_eND), *tensors_of(self.w2_eDF), *biases]
        return sum(_bytes_of_one(tensor) for tensor in held)

    def parts(self, local: int) -> list[torch.Tensor]:
        """Return the tensors that one expert consists of, as views."""
        biases = [bias[local] for bias in (self.b13_eN, self.b2_eD) if bias is not None]
        return [*parts_of(self.w13_eND, local), *parts_of(self.w2_eDF, local), *biases]

    def values(self, local: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one expert's weights in float32, w13 [N, D] and w2 [D, F]."""
        return (
            self.w13_eND.dequantised(local, torch.float32),
            self.w2_eDF.dequantised(local, torch.float32),
        )

    def rows(
        self, matrix: Matrix, local: int, first: int, count: int, *, alternate: bool = False
    ) -> SinkOfRows:
        """Return the sink of rows [first, first + count) of one expert's matrix.

        alternate: whether rows of gate and up alternate in the checkpoint, for what is kept.
        """
        weights, part = (self.w13_eND, self._ffn) if matrix == "w13" else (self.w2_eDF, count)
        layout, source = getattr(self.layouts, matrix), None
        if self.source is not None:
            source = getattr(self.source, matrix)
        return SinkOfRows(
            weights, layout, local, first, count, part, source, self.layouts.kept, alternate
        )

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
        w13, w2 = self.w13_eND, self.w2_eDF
        if isinstance(w13, RowWeights):
            assert isinstance(w2, RowWeights) and self.form.is_plain, "what is held alike"
            return scaled_ffn(rows_RD, w13, w2, expert_counts, out_RD, index_R)
        if isinstance(w13, BlockWeights):
            assert isinstance(w2, BlockWeights) and self.form.is_plain, "what is held alike"
            return block_scaled_ffn(rows_RD, w13, w2, expert_counts, out_RD, index_R)
        assert not isinstance(w2, RowWeights | BlockWeights), "both matrices are held alike"
        if (
            self.form.is_plain
            and isinstance(w13, QuantisedWeights)
            and isinstance(w2, QuantisedWeights)
        ):
            return grouped_ffn_quantised(rows_RD, w13, w2, expert_counts, out_RD, index_R)
        return low_bit_ffn(rows_RD, w13, w2, expert_counts, out_RD, index_R, self._between)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Run every form of the product that steps may take, on rows of zeros.

        Args:
            dtype: of rows.
        """
        num_local = self.w2_eDF.num_experts
        if num_local == 0:
            return
        more = (num_local, MASKED_ROWS + 1) if isinstance(self.w2_eDF, BlockWeights) else ()
        for count in (*ROWS_OF_HEIGHTS, *more):
            shape = count, self.w2_eDF.outputs
            rows_RD = torch.zeros(shape, dtype=dtype, device=tensors_of(self.w2_eDF)[0].device)
            counts = [count] + [0] * (num_local - 1)
            self(rows_RD, counts)
            self(rows_RD, counts, None, torch.arange(count, device=rows_RD.device))


class SinkOfRows:
    """Rows of one expert's matrix, quantised as they arrive; a `RowSink`."""

    def __init__(
        self,
        weights: LowBit,
        layout: Layout,
        local: int,
        first: int,
        count: int,
        part: int,
        source: Layout | None,
        keeps_stored: bool,
        alternate: bool,
    ) -> None:
        self._weights, self._layout, self._source = weights, layout, source
        self._local, self._first, self._part, self._alternate = local, first, part, alternate
        self.keeps_stored = keeps_stored
        self.shape = (count, weights.inputs)
        self.device = tensors_of(weights)[0].device
        self.num_bytes = bytes_of_rows(weights, count)

    def take(self, rows_OI: torch.Tensor) -> None:
        """Quantise all rows, some at a time; see `RowSink`."""
        weights, first = self._weights, self._first
        step = max(1, _MOST_WEIGHTS // max(1, weights.inputs))
        # A block's rows are rounded together.
        step = -(-step // FP8_BLOCK[0]) * FP8_BLOCK[0]
        # Blocks begin anew with gate and up, whether a file has them apart or together.
        for half_OI in rows_OI.split(max(1, self._part)):
            for part_OI in half_OI.split(step):
                part_1OI = part_OI[None]
                if self._source is not None:
                    part_1OI = round_to(part_1OI, self._source).dequantised(0, torch.float32)[None]
                set_rows(weights, self._local, first, round_to(part_1OI, self._layout))
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

    def take_floats(self, first: int, codes_OB: torch.Tensor, scale_OG: torch.Tensor) -> None:
        """Take some of the rows as small floats; see `RowSink`."""
        codes_OB, scale_OG = (to_device(each, self.device) for each in (codes_OB, scale_OG))
        assert isinstance(self._layout, FloatLayout), "what is kept is what the layout says"
        made, at_O = pack_floats(codes_OB, scale_OG, self._layout), None
        if self._alternate:
            row_O = torch.arange(first, first + len(codes_OB), device=self.device)
            at_O, first = row_O % 2 * (self.shape[0] // 2) + row_O // 2, 0
        set_rows(self._weights, self._local, self._first + first, made, at_O)


def _bytes_of_one(tensor_e: torch.Tensor) -> int:
    return tensor_e.shape[1:].numel() * tensor_e.itemsize
