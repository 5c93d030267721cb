"""Recorded loads that nobody recorded: zipf popularity that drifts from step to step.

An expert's popularity is zipf by a random rank of the expert, times exp(x) with x an
Ornstein-Uhlenbeck process of its own: within `memory` steps it forgets where it was. Rows of a step
are drawn from it. Steps that were not planned for continue the same processes.

Legend: S steps, E experts.
"""

from __future__ import annotations

import numpy as np


def drifting_loads(
    num_steps: int,
    num_experts: int,
    rows: int,
    *,
    exponent: float = 0.5,
    drift: float = 0.3,
    memory: float = 100.0,
    seed: int = 0,
) -> np.ndarray:
    """Return rows of every expert per step, int64 [S, E].

    Args:
        num_steps: S.
        num_experts: E.
        rows: of all experts per step.
        exponent: of the zipf popularity.
        drift: standard deviation of the log popularity around it.
        memory: steps in which the deviation decays to 1/e.
        seed: of all draws.
    """
    draw = np.random.default_rng(seed)
    base_E = -exponent * np.log(draw.permutation(num_experts) + 1.0)
    keep = float(np.exp(-1.0 / memory))
    state_E = drift * draw.standard_normal(num_experts)
    loads_SE = np.empty((num_steps, num_experts), dtype=np.int64)
    for step in range(num_steps):
        noise_E = draw.standard_normal(num_experts)
        state_E = keep * state_E + drift * np.sqrt(1 - keep * keep) * noise_E
        weight_E = np.exp(base_E + state_E)
        loads_SE[step] = draw.multinomial(rows, weight_E / weight_E.sum())
    return loads_SE
