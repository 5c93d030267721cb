"""Query scale: attention temperature tuning, queries that grow with their position.

A query at position p is multiplied by 1 + strength * ln(1 + floor((p + 1) / interval)) in layers
without rotary embedding (Llama 4; Nakanishi, Scalable-Softmax, arXiv 2501.19399).

Legend: P positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryScale:
    """The factor on the queries of a layer as a function of their position."""

    interval: int  # positions that share a factor (floor_scale)
    strength: float  # of the growth (attn_scale)

    def table(self, max_len: int, device: torch.device) -> torch.Tensor:
        """Return the factors of the positions below `max_len`, float32 [P]."""
        position_P = torch.arange(max_len, dtype=torch.float32)
        steps_P = torch.floor((position_P + 1.0) / self.interval)
        return (torch.log1p(steps_P) * self.strength + 1.0).to(device)
