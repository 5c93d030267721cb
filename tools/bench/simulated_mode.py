"""bench_moe_layer.py --capacity --simulated: more ranks than there are cores.

The same policies and loads as `capacity_mode.py`, each rank's work run alone on the whole machine
by `simulated_ranks.py`. All output is labelled so.

    layer ms          the next three together
    until dispatch    of the slowest rank: gate, agreement, packing
    experts           of the slowest rank: regrouping, experts, weighing
    collectives       the agreement's and both all-to-alls, as measured between 2 real ranks

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench.capacity_mode import DROPLESS, policies
from bench.loads import rank_loads
from bench.moe_case import MoEShape, MoEWeights
from bench.report import table
from bench.simulated_ranks import PolicyTime, SimulatedRanks
from bench.transfers import Kind, Transfers
from engine.config import CapacityConfig

HEADER = ["policy", "layer ms", "speedup", "bound S", "of bound", "rows"]
HEADER += ["until dispatch ms", "experts ms", "collectives ms"]


def simulated_case(
    shape: MoEShape,
    weights: MoEWeights,
    num_ranks: int,
    loads_E: np.ndarray,
    gammas: Sequence[str],
    transfers: Mapping[Kind, Transfers],
    *,
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """Time every policy on simulated ranks; return the figures of each."""
    ranks = SimulatedRanks(shape, weights, num_ranks, loads_E, seed)
    settings = {name: CapacityConfig(**fields) for name, fields in policies(shape, gammas).items()}
    times = ranks.compare(settings, transfers, rounds)
    return {name: _entry(time, times[DROPLESS]) for name, time in times.items()}


def _entry(time: PolicyTime, base: PolicyTime) -> dict[str, Any]:
    speedup, bound = base.seconds / time.seconds, max(base.rows) / max(time.rows)
    return {
        "virtual": True,
        "seconds": time.seconds,
        "agree_seconds": time.agree_seconds,
        "work_seconds": time.work_seconds,
        "collective_seconds": time.collective_seconds,
        "rows": time.rows,
        "speedup": speedup,
        "bound": bound,
        "of_bound": speedup / bound,
        "dropped": 1 - sum(time.rows) / sum(base.rows),
    }


def simulated_text(
    name: str, loads_E: np.ndarray, tokens: int, num_ranks: int, figures: dict[str, Any]
) -> str:
    """Return one case's table, labelled."""
    rows = [
        [
            policy,
            entry["seconds"] * 1e3,
            entry["speedup"],
            entry["bound"],
            f"{entry['of_bound']:.1%}",
            f"{0 - entry['dropped']:+.1%}",
            max(entry["agree_seconds"]) * 1e3,
            max(entry["work_seconds"]) * 1e3,
            entry["collective_seconds"] * 1e3,
        ]
        for policy, entry in figures.items()
    ]
    ranks = rank_loads(loads_E, num_ranks)
    return (
        f"{name}: SIMULATED, {num_ranks} ranks of {tokens:,} tokens, each run alone on the "
        "whole machine;\ncollectives take what 2 real ranks took. Max/mean rows: "
        f"experts {loads_E.max() / loads_E.mean():.2f}, ranks {ranks.max() / ranks.mean():.2f}\n"
        f"{table(HEADER, rows)}"
    )
