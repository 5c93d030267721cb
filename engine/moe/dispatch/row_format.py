"""Row format: the bytes of a dispatched row where it is more than the row in the model's dtype.

    payload   the row, in the model's dtype, in bfloat16, or in float8_e4m3fn with one scale
    scale     float32, with float8: the row's largest magnitude / 448
    weights   float32 [e], where rows are pre-reduced: the combine weights of the group's experts
    bitmap    uint8 [B], where rows are deduplicated: which of them the row serves, see `dedup.py`
    padding   to 16 bytes, so that payloads stay aligned

All of it is one row of bytes, so one all-to-all is enough. Rows that need none of it are sent
unpacked, without a row format.

float8 keeps 3 bits of mantissa: an element differs by at most 1/16 of itself, or by 1/1,024 of the
scale where it is smaller than scale / 64. A row that holds NaN or infinity is received as NaN.

Legend: T tokens, U rows sent, V rows received, R assignments received, D model dim, L bytes of a
packed row, C cells of unique rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import DispatchConfig
from engine.ops.permute import encode_rows, pack_rows, unpack_rows
from engine.ops.unique_rows import pack_headers

_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens as `pack` takes them (`engine.ops.permute.encode_rows`)."""

    rows_TD: torch.Tensor  # payload dtype, float8 as uint8; where `pack` casts, as they were
    scale_T1: torch.Tensor | None  # float32, with float8 that is cast already


class RowFormat:
    """Packs and unpacks rows of `width` numbers of `dtype`.

    Args:
        width: D.
        dtype: of unpacked rows.
        payload: the dtype in which they are sent.
        num_weights: e, 0 for none.
        bitmap_bytes: B, 0 for none.
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
        self.row_bytes = -(-(self._bits + bitmap_bytes) // 16) * 16  # L

    def encode(self, x_TD: torch.Tensor) -> Encoded:
        """Return tokens [T, D] in the payload's dtype, each row scaled by itself."""
        return Encoded(*encode_rows(x_TD, self.payload))

    def pack(self, encoded: Encoded, token_U: torch.Tensor, out_UL: torch.Tensor) -> None:
        """Write the payload of the tokens token_U (int64), and their scales, into out_UL."""
        rows = (encoded.rows_TD, encoded.scale_T1)
        pack_rows(rows, token_U, out_UL, self.payload, self._scale)

    def pack_header(
        self,
        cell_U: torch.Tensor,
        bits_CB: torch.Tensor,
        weights_Ce: torch.Tensor | None,
        out_UL: torch.Tensor,
    ) -> None:
        """Write the bitmaps (uint8) and combine weights (float32) of the cells cell_U (int64)."""
        pack_headers(cell_U, bits_CB, weights_Ce, out_UL, self._bits, self._weights)

    def bits(self, recv_VL: torch.Tensor) -> torch.Tensor:
        """Return the bitmaps of received rows, uint8 [V, B], a view."""
        return recv_VL[:, self._bits : self._bits + self.bitmap_bytes]

    def weights(self, recv_VL: torch.Tensor) -> torch.Tensor:
        """Return the combine weights of received rows, float32 [V, e], a view."""
        return self._part(recv_VL, self._weights, self.num_weights)

    def unpack(
        self, recv_VL: torch.Tensor, index_R: torch.Tensor | None, out_RD: torch.Tensor
    ) -> None:
        """Write received rows, those of index_R (int64; None: all in order), into out_RD."""
        unpack_rows(recv_VL, index_R, out_RD, self.payload, self._scale)

    def _part(self, rows_L: torch.Tensor, offset: int, count: int) -> torch.Tensor:
        return rows_L[:, offset : offset + 4 * count].view(torch.float32)


@dataclass(frozen=True, slots=True)
class RowFormats:
    """The row formats that a layer's settings allow."""

    width: int  # D
    dtype: torch.dtype  # of the layer's computation
    payload: torch.dtype  # moe.dispatch.dtype
    pre_reduced: bool = False  # moe.dispatch.partial_sums: combine one row per token and rank

    @property
    def combine_bytes(self) -> int:
        """Bytes of a row in the combine."""
        return self.width * self.dtype.itemsize

    @property
    def dispatch_bytes(self) -> int:
        """Bytes of a dispatched row that is not deduplicated."""
        row_format = self.per_assignment()
        return self.combine_bytes if row_format is None else row_format.row_bytes

    def per_assignment(self) -> RowFormat | None:
        """Return the format of rows sent once per assignment; None: unpacked."""
        if self.payload == self.dtype:
            return None
        return RowFormat(self.width, self.dtype, self.payload)

    def deduplicated(self, most_experts: int, bitmap_bytes: int) -> RowFormat:
        """Return the format of rows sent once per token and rank."""
        weights = most_experts if self.pre_reduced else 0
        return RowFormat(
            self.width, self.dtype, self.payload, num_weights=weights, bitmap_bytes=bitmap_bytes
        )

    @classmethod
    def of(cls, width: int, dtype: torch.dtype, config: DispatchConfig) -> RowFormats:
        """Return the formats for rows of `width` numbers under moe.dispatch."""
        payload = {"auto": dtype, "bf16": torch.bfloat16, "fp8": _FP8}[config.dtype]
        return cls(width, dtype, payload, config.partial_sums)
