"""Wire format: what a row looks like between two ranks where it is more than the row itself.

    payload   the row, as it is, in bfloat16, or in float8_e4m3fn with one scale
    scale     float32, with float8: the row's largest magnitude / 448
    weights   float32 [e], with partial sums: the combine weights of the group's experts
    bitmap    uint8 [B], with deduplication: which of them the row serves, see dedup.py
    padding   to 16 bytes, so that payloads stay aligned

All of it is one row of bytes, so rows and what belongs to them travel in one all-to-all. Rows that
need none of it travel as they are, without a wire format.

float8 keeps 3 bits of mantissa: an element differs by at most 1/16 of itself, or by 1/1,024 of the
scale where it is smaller than scale / 64. A row that holds NaN or infinity arrives as NaN.

Legend: T tokens, U rows sent, V rows received, R assignments received, D model dim, L bytes of a
wire row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import DispatchConfig
from engine.ops.permute import gather_rows

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
# Rows turned back at a time: what is in between stays small beside the row buffers.
_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens in the payload's form. rows_TD: payload dtype, float8 as uint8. scale_T1: float32."""

    rows_TD: torch.Tensor
    scale_T1: torch.Tensor | None


class RowFormat:
    """Packs rows of `width` numbers of `dtype`, and reads them.

    payload: the dtype they travel in. num_weights, bitmap_bytes: e and B, 0 for none. row_bytes: L.
    """

    def __init__(
        self,
        width: int,
        dtype: torch.dtype,
        payload: torch.dtype,
        *,
        num_weights: int = 0,
        bitmap_bytes: int = 0,
    ) -> None:
        self.width, self.dtype, self.payload = width, dtype, payload
        self.num_weights, self.bitmap_bytes = num_weights, bitmap_bytes
        self._scaled = payload == _FP8
        self._scale = -(-width * payload.itemsize // 4) * 4
        self._weights = self._scale + 4 * self._scaled
        self._bits = self._weights + 4 * num_weights
        self.row_bytes = -(-(self._bits + bitmap_bytes) // 16) * 16

    def encode(self, x_TD: torch.Tensor) -> Encoded:
        """Turn tokens [T, D] into the payload's form, each row by itself."""
        if not self._scaled:
            return Encoded(x_TD.to(self.payload), None)
        x_TD = x_TD.float()
        scale_T1 = x_TD.abs().amax(1, keepdim=True) / _FP8_MAX
        scale_T1 = scale_T1.clamp(min=torch.finfo(torch.float32).tiny)  # NaN stays NaN
        return Encoded((x_TD / scale_T1).to(_FP8).view(torch.uint8), scale_T1)

    def pack(self, encoded: Encoded, token_U: torch.Tensor, out_UL: torch.Tensor) -> None:
        """Write the payload of the tokens token_U (int64), and their scales, into out_UL."""
        dtype = torch.uint8 if self._scaled else self.payload
        gather_rows(encoded.rows_TD, token_U, out_UL.view(dtype)[:, : self.width])
        if encoded.scale_T1 is not None:
            self._part(out_UL, self._scale, 1).copy_(encoded.scale_T1.index_select(0, token_U))

    def pack_header(
        self, bits_UB: torch.Tensor, weights_Ue: torch.Tensor | None, out_UL: torch.Tensor
    ) -> None:
        """Write bitmaps (uint8) and combine weights (float32) into out_UL."""
        out_UL[:, self._bits : self._bits + self.bitmap_bytes].copy_(bits_UB)
        if weights_Ue is not None:
            self.weights(out_UL).copy_(weights_Ue)

    def bits(self, arrived_VL: torch.Tensor) -> torch.Tensor:
        """The bitmaps of arrived rows: uint8 [V, B], a view."""
        return arrived_VL[:, self._bits : self._bits + self.bitmap_bytes]

    def weights(self, arrived_VL: torch.Tensor) -> torch.Tensor:
        """The combine weights of arrived rows: float32 [V, e], a view."""
        return self._part(arrived_VL, self._weights, self.num_weights)

    def unpack(
        self, arrived_VL: torch.Tensor, index_R: torch.Tensor | None, out_RD: torch.Tensor
    ) -> None:
        """Write arrived rows, those of index_R (int64; None: all in order), into out_RD."""
        if not self._scaled and self.payload == self.dtype:
            rows_VD = arrived_VL.view(self.dtype)[:, : self.width]
            if index_R is None:
                out_RD.copy_(rows_VD)
            else:
                gather_rows(rows_VD, index_R, out_RD)
            return
        for start in range(0, out_RD.shape[0], _BLOCK):
            block = slice(start, min(start + _BLOCK, out_RD.shape[0]))
            if index_R is None:
                part = arrived_VL[block]
            else:
                part = arrived_VL.index_select(0, index_R[block])
            rows = part.view(self.payload)[:, : self.width]
            if self._scaled:
                out_RD[block] = rows.float() * self._part(part, self._scale, 1)
            else:
                out_RD[block] = rows

    def _part(self, rows_L: torch.Tensor, offset: int, count: int) -> torch.Tensor:
        return rows_L[:, offset : offset + 4 * count].view(torch.float32)


@dataclass(frozen=True, slots=True)
class RowFormats:
    """What a layer's rows are and how the settings let them travel.

    width: D. dtype: the compute dtype. payload: moe.dispatch.dtype. partial: send one summed row
    a token and rank home (moe.dispatch.partial_sums).
    """

    width: int
    dtype: torch.dtype
    payload: torch.dtype
    partial: bool = False

    @property
    def home_bytes(self) -> int:
        """Bytes of a row on the way back."""
        return self.width * self.dtype.itemsize

    @property
    def out_bytes(self) -> int:
        """Bytes of a row on the way out that is not deduplicated."""
        wire = self.each()
        return self.home_bytes if wire is None else wire.row_bytes

    def each(self) -> RowFormat | None:
        """The format of rows that go once an expert; None: as they are."""
        if self.payload == self.dtype:
            return None
        return RowFormat(self.width, self.dtype, self.payload)

    def once(self, most_experts: int, bitmap_bytes: int) -> RowFormat:
        """The format of rows that go once a rank."""
        weights = most_experts if self.partial else 0
        return RowFormat(
            self.width, self.dtype, self.payload, num_weights=weights, bitmap_bytes=bitmap_bytes
        )

    @classmethod
    def of(cls, width: int, dtype: torch.dtype, config: DispatchConfig) -> RowFormats:
        """From the settings."""
        payload = {"auto": dtype, "bf16": torch.bfloat16, "fp8": _FP8}[config.dtype]
        return cls(width, dtype, payload, config.partial_sums)
