"""Decision log: which assignments every layer kept, dropped and added, recorded on request.

It explains what one request lost. Off by default, since it copies every decision to the host.

Legend: T tokens on this rank, K top-k, e experts on this rank, W ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDecision:
    """One layer of one step, this rank's tokens."""

    step: int  # counted from 0 since recording began
    layer: int
    request_T: np.ndarray  # with position_T the global token id
    position_T: np.ndarray
    eligible_T: np.ndarray  # bool, subject to capacity
    topk_ids_TK: np.ndarray  # int64, -1 for a zero expert
    keep_TK: np.ndarray  # bool, true for a zero expert
    extra_Te: np.ndarray | None  # bool, of own_experts; None: no expansion
    own_experts: list[int]  # the experts that this rank holds, homes and then copies
    before_WE: np.ndarray  # int64, rows that each rank sends to each expert
    after_WE: np.ndarray  # the same after capacity, without the extras of other ranks


class DecisionLog:
    """Collects decisions while recording is on."""

    def __init__(self) -> None:
        self.entries: list[LayerDecision] | None = None  # None: recording is off
        self.step = 0  # steps since recording began

    def start(self) -> list[LayerDecision]:
        """Record from now on, into the returned list."""
        self.entries, self.step = [], 0
        return self.entries

    def stop(self) -> None:
        """Stop recording."""
        self.entries = None

    def next_step(self) -> None:
        """Count a step."""
        self.step += 1
