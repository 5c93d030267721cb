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


@dataclass(frozen=True, slots=True)
class Decision:
    """What is computed for this rank's tokens, and every rank's counts."""

    # int64, the instances of the top-k experts, -1 where dropped, then one column per local
    # instance for extras, -1 where none. Without copies instances are experts in home order
    ids_TM: torch.Tensor
    weights_TM: torch.Tensor  # float32 combine weights, 0 where the id is -1
    order: ExpertOrder  # ids_TM sorted by instance
    # int64 on the host, every rank's `ExpertOrder.counts_to_exchange`; the extras of other ranks,
    # which stay there, may be missing
    exchanged_Wn: np.ndarray
    before_WE: np.ndarray  # top-k assignments before capacity, per rank and expert
    counts_WE: np.ndarray  # rows per rank and expert after it; extras as in exchanged_Wn
    # bool, true for zero experts; None: nothing could be dropped or added
    keep_TK: torch.Tensor | None = None
    extra_Te: torch.Tensor | None = None  # bool; None: without expansion
