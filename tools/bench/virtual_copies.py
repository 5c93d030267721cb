"""Virtual ranks from a recorded trace: the experts of every rank, with int4 copies, timed in turn.

Each rank's experts run alone on one core on the rows that the split gives them, rank after rank;
the layer waits for the slowest. Placements are planned on the first half of the recorded steps and
timed on steps of the second. Rows are random: they cost what any rows cost.

Legend: S steps, L layers, E experts, W ranks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.moe.local_experts import LocalExperts
from engine.moe.placement.instances import Instances
from engine.moe.placement.placement import LayerPlacement
from engine.moe.placement.row_split import RowSplit, SplitRule
from engine.moe.placement.search import plan_layer


@dataclass(frozen=True, slots=True)
class VirtualShares:
    """Shares of perfect balance on so many ranks, over all timed layers and steps."""

    ranks: int
    rows: float  # by rows, with copies
    time: float  # by time, with copies
    time_before: float  # by time, contiguous homes without copies


class _Rank:
    """The experts of one virtual rank."""

    def __init__(self, homes: int, copies: int, hidden: int, ffn: int) -> None:
        self._experts = LocalExperts(
            homes,
            copies,
            "int4",
            hidden=hidden,
            ffn=ffn,
            backend="torch",
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        for local in range(homes + copies):
            w13_2FD = torch.randn(2 * ffn, hidden) * hidden**-0.5
            self._experts.set_weights(local, w13_2FD, torch.randn(hidden, ffn) * hidden**-0.5)
        self._experts.finalize_weights()

    def seconds(self, counts: list[int], x_RD: torch.Tensor) -> float:
        rows_RD = x_RD[: sum(counts)]
        begin = time.perf_counter()
        self._experts(rows_RD, counts)
        return time.perf_counter() - begin


@torch.inference_mode()
def virtual_shares(
    loads_SLE: np.ndarray,
    num_ranks: int,
    *,
    hidden: int,
    ffn: int,
    steps: int = 3,
    rounds: int = 5,
) -> VirtualShares:
    """Plan W int4 copies per layer, and time the experts of every rank.

    Args:
        loads_SLE: int64, the recorded rows of prefill steps.
        num_ranks: W.
        hidden, ffn: of the experts.
        steps: of the second half, that are timed.
        rounds: of every timing, of which the median counts.
    """
    half = len(loads_SLE) // 2
    most = int(loads_SLE.sum(2).max())
    x_RD = torch.randn(most, hidden)
    ideal_rows = slowest_rows = ideal = slowest = slowest_before = 0.0
    chosen = np.linspace(half, len(loads_SLE) - 1, steps).astype(int)
    for layer in range(loads_SLE.shape[1]):
        num_experts = loads_SLE.shape[2]
        placement = plan_layer({"": loads_SLE[:half, layer]}, num_ranks, num_copies=num_ranks)
        planned = Instances(placement, num_ranks)
        plain = Instances(LayerPlacement.contiguous(num_experts, num_ranks), num_ranks)
        split = RowSplit(planned, SplitRule(low_bit=True))
        before = _ranks(plain, hidden, ffn)
        after = _ranks(planned, hidden, ffn)
        for step in chosen.tolist():
            load_E = loads_SLE[step, layer]
            rows_I = split.rows(load_E[planned.expert_of_home_E])
            times_before = _times(before, plain, load_E, x_RD, rounds)
            times = _times(after, planned, rows_I, x_RD, rounds)
            load_W = np.bincount(planned.rank_I, weights=rows_I, minlength=num_ranks)
            ideal_rows += float(load_W.mean())
            slowest_rows += float(load_W.max())
            ideal += sum(times_before) / num_ranks
            slowest += max(times)
            slowest_before += max(times_before)
    return VirtualShares(
        num_ranks, ideal_rows / slowest_rows, ideal / slowest, ideal / slowest_before
    )


def _ranks(instances: Instances, hidden: int, ffn: int) -> list[_Rank]:
    return [
        _Rank(homes := instances.num_homes(rank), instances.num_local(rank) - homes, hidden, ffn)
        for rank in range(instances.num_ranks)
    ]


def _times(
    ranks: Sequence[_Rank],
    instances: Instances,
    rows_I: np.ndarray,
    x_RD: torch.Tensor,
    rounds: int,
) -> list[float]:
    def timed(rank: int) -> Callable[[], float]:
        first, end = instances.first_instances[rank : rank + 2]
        counts = rows_I[first:end].tolist()
        return lambda: ranks[rank].seconds(counts, x_RD)

    runs = [timed(rank) for rank in range(instances.num_ranks)]
    seconds = [[run() for run in runs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*seconds, strict=True)]
