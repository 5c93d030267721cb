"""Decision: what an agreement returns, and what it needs of a call.

Legend: T tokens on this rank, K top-k, M columns (K, or K + e), E experts in home order, e
instances on this rank, W expert-parallel ranks, n counts per rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.moe.dispatch.plan import ExpertOrder

OnOrder = Callable[[ExpertOrder], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is computed for this rank's tokens; on the device."""

    # int64, the instances of the top-k experts, -1 where dropped, then one column per local
    # instance for extras, -1 where none. Without copies instances are experts in home order
    ids_TM: torch.Tensor
    weights_TM: torch.Tensor  # float32 combine weights, 0 where the id is -1
    order: ExpertOrder  # ids_TM sorted by instance
    # bool, true for zero experts; None: nothing could be dropped or added
    keep_TK: torch.Tensor | None = None
    extra_Te: torch.Tensor | None = None  # bool; None: without expansion


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision(Kept):
    """And every rank's counts, which the host knows."""

    # int64 on the host, every rank's `ExpertOrder.counts_to_exchange`; the extras of other ranks,
    # which stay there, may be missing
    exchanged_Wn: np.ndarray
    before_WE: np.ndarray  # top-k assignments before capacity, per rank and expert
    counts_WE: np.ndarray  # rows per rank and expert after it; extras as in exchanged_Wn


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDecision(Kept):
    """And every rank's counts, which stay on the device: for the loads, nothing waits for them."""

    after_WE: torch.Tensor  # int64, rows per rank and expert
    before_WE: torch.Tensor | None = None  # top-k assignments before capacity; None: the same
    non_finite_W: torch.Tensor | None = None  # int64, 1 where a rank has scores that are not
