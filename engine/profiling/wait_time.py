"""Wait time: splits a rank's time in collectives into waiting and transfer by arrival skew.

A collective cannot end before its last rank arrives. So a rank that arrived `w` nanoseconds before
the last one waited `w`, and only the rest of its span was transfer. Arrivals of a step are
exchanged with a later control message (`generation/control.py`), without another collective. In a
TENSOR collective a rank waits for its own tensor group only. Stamps of ranks on other hosts are
corrected by the measured clock offset.

Worked example: spans of one collective last 10, 4 and 3 ms on ranks that arrived at t = 0, 6 and 7
ms: they waited 7, 1 and 0 ms and transferred 3, 3 and 3 ms.
"""

from __future__ import annotations

import numpy as np

from engine.profiling.phase_clock import COLLECTIVE_PHASES, NONE, Phase, Spans


def waiting_ns(spans: Spans, arrivals_WC: np.ndarray, tensor_ranks: range = range(1)) -> np.ndarray:
    """Return how many nanoseconds of every span this rank waited for stragglers, int64 [n].

    Args:
        arrivals_WC: int64 [W, C], aligned nanoseconds at which each rank started each of the step's
            first C collectives, this rank included; negative where a rank has no stamp.
        tensor_ranks: rank offsets of this rank's tensor group: its rows.
    """
    waited = np.zeros_like(spans.starts)
    index = np.flatnonzero((spans.collectives >= 0) & (spans.collectives < arrivals_WC.shape[1]))
    at = spans.collectives[index]
    last = arrivals_WC.max(0, initial=NONE)[at]
    if len(tensor_ranks) > 1:
        last_in_group = arrivals_WC[list(tensor_ranks)].max(0, initial=NONE)[at]
        last = np.where(spans.phases[index] == Phase.TENSOR, last_in_group, last)
    starts, ends = spans.starts[index], spans.ends[index]
    waited[index] = (last - starts).clip(0, ends - starts)
    return waited


def breakdown(phase_seconds: np.ndarray, waiting: float) -> dict[str, float]:
    """Return seconds per kind of work: attention, experts, communication, waiting, other.

    Communication is the time in collectives that was not waiting.

    Args:
        phase_seconds: float64 [len(Phase)].
        waiting: seconds of them, in collectives.
    """
    collectives = float(phase_seconds[list(COLLECTIVE_PHASES)].sum())
    attention = float(phase_seconds[Phase.ATTENTION])
    experts = float(phase_seconds[Phase.EXPERTS])
    return {
        "attention": attention,
        "experts": experts,
        "communication": max(0.0, collectives - waiting),
        "waiting": waiting,
        "other": float(phase_seconds.sum()) - attention - experts - collectives,
    }
