"""Waiting or transfer: splits each rank's time in collectives by comparing when the ranks arrived.

A collective cannot end before its last rank arrives. So a rank that arrived `w` nanoseconds before
the last one waited `w`, and only the rest of its span was transfer. Ranks send their arrival stamps
of step n with later control words (`control.py`): no collective is added for it. In a TENSOR
collective a rank waits for those of its tensor group alone.
Stamps of ranks on other hosts are moved by the clock offset measured at start.

Worked example: spans of one collective last 10, 4 and 3 ms on ranks that arrived at t = 0, 6 and 7
ms: they waited 7, 1 and 0 ms and transferred 3, 3 and 3 ms.
"""

from __future__ import annotations

import numpy as np

from engine.profiling.phase_clock import COLLECTIVE_PHASES, NONE, Phase, Spans


def waiting_ns(spans: Spans, arrivals_WC: np.ndarray, peers: range = range(1)) -> np.ndarray:
    """Nanoseconds of every span that this rank waited for late peers, int64 [n].

    arrivals_WC: int64 [W, C], aligned nanoseconds at which each rank started each of the step's
    first C collectives; negative where a rank has no stamp. This rank's is one of the rows. peers:
    the rows of its tensor group.
    """
    waited = np.zeros_like(spans.starts)
    index = np.flatnonzero((spans.collectives >= 0) & (spans.collectives < arrivals_WC.shape[1]))
    at = spans.collectives[index]
    last = arrivals_WC.max(0, initial=NONE)[at]
    if len(peers) > 1:
        of_peers = arrivals_WC[peers.start : peers.stop].max(0, initial=NONE)[at]
        last = np.where(spans.phases[index] == Phase.TENSOR, of_peers, last)
    starts, ends = spans.starts[index], spans.ends[index]
    waited[index] = (last - starts).clip(0, ends - starts)
    return waited


def breakdown(phase_seconds: np.ndarray, waiting: float) -> dict[str, float]:
    """Group phase seconds for the summary: attention, experts, communication, waiting, other; in
    seconds.

    phase_seconds: float64 [len(Phase)]. communication is the time in collectives that was not
    waiting.
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
