"""Arrival skew: at every collective of a group, the rank for which the others waited. Pure.

At a collective the rank that waited least arrived last. The wait of a mean rank there is attributed
to it, and to its phase before the collective: what it computed while the others already waited.

Worked example, 3 ranks that waited 7, 1 and 0 ms in a combine: 2.67 ms are attributed to rank 2,
and to the phase before its combine, experts.

Legend: W ranks, S steps, P phases, C collectives of all steps, D decoder layers + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from straggler.aggregate import Times
from straggler.run import DURATION, LAYER, OFFSET, PARTIAL, PHASE, WAITED, Group


@dataclass(frozen=True, slots=True)
class ArrivalSkew:
    """Late arrivals of a group's ranks and their cost."""

    collectives: int  # number of those compared
    last_W: np.ndarray  # in how many of them each rank arrived last
    cost_WP: np.ndarray  # seconds that a mean rank waited for each rank, by its phase before
    cost_WD: np.ndarray  # the same by decoder layer
    seconds: float  # length of the steps compared, of a mean rank


def arrival_skew(group: Group) -> ArrivalSkew:
    """Attribute the wait at every collective of a group's settled steps to the last rank.

    Steps in which ranks called different collectives, or have unknown waiting times, are left out.
    """
    header = group.ranks[0].header
    num_ranks, num_phases = len(group.ranks), len(header.phases)
    step_C, index_WC = _collectives(group)
    tables = [rank.table_N7 for rank in group.ranks]
    waited_WC = _column(tables, index_WC, WAITED)
    unknown_S = np.bincount(step_C[(waited_WC < 0).any(0)], minlength=len(group.steps_S)) > 0
    use_S = group.settled_S & ~unknown_S
    use_C = use_S[step_C]
    step_C, index_WC, waited_WC = step_C[use_C], index_WC[:, use_C], waited_WC[:, use_C]
    waited_WC = np.minimum(waited_WC, _column(tables, index_WC, DURATION))
    starts_WS = np.stack([rank.starts_S for rank in group.ranks])
    arrived_WC = starts_WS[:, step_C] + _column(tables, index_WC, OFFSET)
    # Ranks that waited as little as each other: the one whose span began last.
    least_WC = waited_WC == waited_WC.min(0)
    last_C = np.where(least_WC, arrived_WC, np.iinfo(np.int64).min).argmax(0)
    cost_C = waited_WC.mean(0) * 1e-9
    before_WC = _column(tables, (index_WC - 1).clip(0), PHASE)
    before_C = before_WC[last_C, np.arange(len(last_C))]
    layer_C = tables[0][index_WC[0], LAYER] + 1
    num_rows = header.num_layers + 1
    spent = [np.bincount(rank.step_of_N, rank.table_N7[:, DURATION]) for rank in group.ranks]
    return ArrivalSkew(
        collectives=len(last_C),
        last_W=np.bincount(last_C[cost_C > 0], minlength=num_ranks),
        cost_WP=_sums(last_C, before_C, cost_C, (num_ranks, num_phases)),
        cost_WD=_sums(last_C, layer_C, cost_C, (num_ranks, num_rows)),
        seconds=float(np.mean(spent, axis=0)[use_S].sum()) * 1e-9,
    )


def _collectives(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """Return the collectives of the whole group that all ranks called equally.

    As the index of their step, int64 [C], and of their row in each rank's table, int64 [W, C].
    """
    header = group.ranks[0].header
    kinds = [each for each in header.collectives if header.phases[each] not in PARTIAL]
    rows = [np.flatnonzero(np.isin(rank.table_N7[:, PHASE], kinds)) for rank in group.ranks]
    steps = [rank.step_of_N[row] for rank, row in zip(group.ranks, rows, strict=True)]
    num_steps = len(group.steps_S)
    counts_WS = np.stack([np.bincount(step, minlength=num_steps) for step in steps])
    equal_S = (counts_WS == counts_WS[0]).all(0)

    def kept(equal_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        index = [row[equal_S[step]] for row, step in zip(rows, steps, strict=True)]
        return steps[0][equal_S[steps[0]]], np.stack(index)

    step_C, index_WC = kept(equal_S)
    tables = [rank.table_N7 for rank in group.ranks]
    differs_C = np.zeros(len(step_C), dtype=bool)
    for column in (PHASE, LAYER):
        values_WC = _column(tables, index_WC, column)
        differs_C |= (values_WC != values_WC[0]).any(0)
    equal_S &= np.bincount(step_C[differs_C], minlength=num_steps) == 0
    return kept(equal_S)


def _column(tables: list[np.ndarray], index_WC: np.ndarray, column: int) -> np.ndarray:
    return np.stack([table[row, column] for table, row in zip(tables, index_WC, strict=True)])


def _sums(
    one_C: np.ndarray, other_C: np.ndarray, weights_C: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    cells = np.bincount(one_C * shape[1] + other_C, weights_C, shape[0] * shape[1])
    return cells.reshape(shape)


def sentence(group: Group, times: Times, skew: ArrivalSkew) -> str:
    """Return which rank arrived last most often, after which phase, and the cost of waiting."""
    if len(group.ranks) == 1:
        return "One rank: it waits for no other."
    share = times.waiting_share
    if not skew.last_W.any():
        return f"Waiting for late ranks takes {share:.0%} of the time; no rank arrived late."
    worst = int(skew.last_W.argmax())
    header, cost = group.ranks[worst].header, float(skew.cost_WP[worst].sum())
    text = (
        f"Rank {header.rank} on {header.host} arrived last most often, in "
        f"{skew.last_W[worst] / skew.collectives:.0%} of {skew.collectives:,} collectives, mostly "
        f"after {group.phases[int(skew.cost_WP[worst].argmax())]}; a mean rank lost "
        f"{_share(cost, skew)} of its time to it"
    )
    layer = int(skew.cost_WD[worst].argmax()) - 1
    text += f", most of all {'outside of the layers' if layer < 0 else f'in layer {layer}'}."
    costliest = int(skew.cost_WP.sum(1).argmax())
    if costliest != worst:
        header, cost = group.ranks[costliest].header, float(skew.cost_WP[costliest].sum())
        text += f" Rank {header.rank} on {header.host} cost more: {_share(cost, skew)}."
    return f"{text} Waiting takes {share:.0%} in all."


def _share(seconds: float, skew: ArrivalSkew) -> str:
    return f"{seconds / skew.seconds if skew.seconds else 0.0:.0%}"
