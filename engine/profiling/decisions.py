"""Decision log: which assignments every layer kept, dropped and added, kept on request.

For tests, for the capacity report and for whoever asks why a request lost what it lost. Off by
default: it copies every decision to the host.

Legend: T tokens on this rank, K top-k, e experts on this rank, W ranks, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDecision:
    """One layer of one step, this rank's tokens.

    step: counted from 0 since recording began. request_T, position_T: the global token id.
    eligible_T: bool. topk_ids_TK: int64. keep_TK: bool. extra_Te: bool, of the experts from
    first_expert on; None without expansion. before_WE, after_WE: int64, rows each rank sends to
    each expert, without the extras of other ranks.
    """

    step: int
    layer: int
    request_T: np.ndarray
    position_T: np.ndarray
    eligible_T: np.ndarray
    topk_ids_TK: np.ndarray
    keep_TK: np.ndarray
    extra_Te: np.ndarray | None
    first_expert: int
    before_WE: np.ndarray
    after_WE: np.ndarray


class DecisionLog:
    """Collects decisions while `entries` is a list."""

    def __init__(self) -> None:
        self.entries: list[LayerDecision] | None = None
        self._step = 0

    def start(self) -> list[LayerDecision]:
        """Record from now on, into the returned list."""
        self.entries, self._step = [], 0
        return self.entries

    def stop(self) -> None:
        """Record no more."""
        self.entries = None

    def next_step(self) -> None:
        """A step is over."""
        self._step += 1

    @property
    def step(self) -> int:
        """Steps since recording began."""
        return self._step
