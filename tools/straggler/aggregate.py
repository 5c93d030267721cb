"""Sums over the spans of a group: time by phase, waiting, loads. Pure.

Worked example, two ranks and one collective: rank 0 waits 6 of its span's 8 ms, rank 1 none of its
2 ms. Waiting is 6 and 0 ms, transfer 2 and 2 ms; the step lost 3 ms, the wait of a mean rank.

Legend: W ranks, S steps, P phases, L MoE layers, E experts; D decoder layers + 1, the first of them
being what is outside of the layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from straggler.run import BYTES, DURATION, LAYER, PHASE, TOKENS, WAITED, Group


@dataclass(frozen=True, slots=True)
class Times:
    """Time of a group's ranks."""

    seconds_WP: np.ndarray  # all of it
    waiting_WP: np.ndarray  # of it, waiting for late ranks
    tokens_WP: np.ndarray  # processed by the phase
    bytes_WP: np.ndarray  # sent to other ranks
    calls_WP: np.ndarray  # number of spans
    lost_DP: np.ndarray  # seconds that a mean rank waited
    length_S: np.ndarray  # seconds of each step, from its first begin to its last end
    lost_S: np.ndarray  # seconds that a mean rank waited in it
    wall: float  # seconds from the first step's begin to the last one's end
    num_tokens: tuple[int, int]  # prefill and decode of all ranks

    @property
    def waiting_share(self) -> float:
        """Share of the ranks' time that was waiting."""
        total = float(self.seconds_WP.sum())
        return float(self.waiting_WP.sum()) / total if total else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Prefill and decode tokens of all ranks over the time that the steps took."""
        return sum(self.num_tokens) / self.wall if self.wall else 0.0


@dataclass(frozen=True, slots=True)
class Loads:
    """Rows of experts and ranks over all steps, before and after capacity and the split.

    Imbalance is the rows of the most loaded rank over those of the mean rank, both summed over
    steps; before, a rank's rows are those of the experts whose home it is. nan where ranks are
    missing.
    """

    layers: list[int]  # the MoE layers
    before_LE: np.ndarray  # int64
    after_LE: np.ndarray  # int64, of home and copies; -1 where the rank of one is missing
    imbalance_L2: np.ndarray  # before and after
    imbalance_2: np.ndarray  # of all layers together
    homes_WL: np.ndarray  # int64, rows of each rank's homes, after
    copies_WL: np.ndarray  # int64, rows of each rank's copies

    @property
    def drop_rate_L(self) -> np.ndarray:
        """Dropped rows over those before capacity, float64 [L]; extras count against drops.

        Experts whose rank is missing are left out.
        """
        known = self.after_LE >= 0
        before = np.where(known, self.before_LE, 0).sum(1)
        after = np.where(known, self.after_LE, 0).sum(1)
        return 1 - np.divide(after, before, out=np.ones(len(before)), where=before > 0)


def times(group: Group) -> Times:
    """Add up a group's spans."""
    header = group.ranks[0].header
    num_phases, num_rows = len(header.phases), header.num_layers + 1
    sums: list[np.ndarray] = []  # a rank's [5, P]
    lost_DP = np.zeros((num_rows, num_phases))
    lost_S = np.zeros(len(group.steps_S))
    for rank in group.ranks:
        table = rank.table_N7
        phases, layers = table[:, PHASE], table[:, LAYER]
        waited = known_waiting(table)
        weights = (table[:, DURATION], waited, table[:, TOKENS], table[:, BYTES], None)
        sums.append(np.stack([np.bincount(phases, each, num_phases) for each in weights]))
        cells = (layers + 1) * num_phases + phases
        lost_DP += np.bincount(cells, waited, num_rows * num_phases).reshape(num_rows, num_phases)
        lost_S += np.bincount(rank.step_of_N, waited, len(lost_S))
    seconds, waiting, tokens, num_bytes, calls = np.stack(sums, axis=1)
    begin_ns, length_ns = group.begin_ns, group.length_ns
    tokens_S2 = sum((rank.tokens_S2 for rank in group.ranks), np.zeros((1, 2), dtype=np.int64))
    prefill, decode = tokens_S2.sum(0)
    return Times(
        seconds_WP=seconds * 1e-9,
        waiting_WP=waiting * 1e-9,
        tokens_WP=tokens.astype(np.int64),
        bytes_WP=num_bytes.astype(np.int64),
        calls_WP=calls.astype(np.int64),
        lost_DP=lost_DP * 1e-9 / len(group.ranks),
        length_S=length_ns * 1e-9,
        lost_S=lost_S * 1e-9 / len(group.ranks),
        wall=float(begin_ns[-1] + length_ns[-1] - begin_ns[0]) * 1e-9,
        num_tokens=(int(prefill), int(decode)),
    )


def known_waiting(table_N7: np.ndarray) -> np.ndarray:
    """Return nanoseconds of waiting in each span, int64 [N]; 0 where unknown."""
    return table_N7[:, WAITED].clip(0, table_N7[:, DURATION])


def loads(group: Group) -> Loads:
    """Add up a group's rows, expert by expert and rank by rank."""
    first = group.ranks[0]
    before_SLE = next(rank.before_SLE for rank in group.ranks if rank.before_SLE is not None)
    num_steps, num_layers, num_experts = before_SLE.shape
    after_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
    before_SLW = np.zeros((num_steps, num_layers, len(group.ranks)), dtype=np.int64)
    after_SLW = np.zeros_like(before_SLW)
    rows_2WL = np.zeros((2, len(group.ranks), num_layers), dtype=np.int64)
    for index, rank in enumerate(group.ranks):
        after_SLW[..., index] = rank.after_SLe.sum(-1)
        for place, layer in enumerate(rank.layers):
            held, rows_e = rank.header.held[layer], rank.after(place)
            after_LE[place, list(held.experts)] += rows_e
            before_SLW[:, place, index] = before_SLE[:, place, list(held.homes)].sum(-1)
            parts = (rows_e[: held.num_homes], rows_e[held.num_homes :])
            rows_2WL[:, index, place] = [each.sum() for each in parts]
    for place, layer in enumerate(first.layers):
        after_LE[place, _unknown(group, layer, num_experts)] = -1
    imbalance = [_imbalance(rows_SLW) for rows_SLW in (before_SLW, after_SLW)]
    if group.missing:
        imbalance = [(np.full(num_layers, np.nan), np.nan)] * 2
    return Loads(
        layers=first.layers,
        before_LE=before_SLE.sum(0, dtype=np.int64),
        after_LE=after_LE,
        imbalance_L2=np.stack([of_layers for of_layers, _ in imbalance], axis=1),
        imbalance_2=np.array([of_all for _, of_all in imbalance]),
        homes_WL=rows_2WL[0],
        copies_WL=rows_2WL[1],
    )


def _unknown(group: Group, layer: int, num_experts: int) -> list[int]:
    """Return the experts of a layer whose rows a missing rank may have."""
    held = [rank.header.held[layer] for rank in group.ranks]
    if sum(len(each.copies) for each in held) < held[0].num_copies:
        return list(range(num_experts))  # of which experts the others are copies is not known
    return sorted(set(range(num_experts)) - {expert for each in held for expert in each.homes})


def _imbalance(rows_SLW: np.ndarray) -> tuple[np.ndarray, float]:
    """Return imbalance of each layer and of all together; 1 without rows.

    [[4, 0], [0, 2]], two steps of one layer on two ranks: (4 + 2) / (2 + 1) = 2.
    """
    if not rows_SLW.shape[1]:
        return np.ones(0), 1.0
    slowest_L, mean_L = rows_SLW.max(-1).sum(0), rows_SLW.mean(-1).sum(0)
    of_layers = np.divide(slowest_L, mean_L, out=np.ones(len(mean_L)), where=mean_L > 0)
    mean = float(mean_L.sum())
    return of_layers, float(slowest_L.sum()) / mean if mean else 1.0


def worst_step(group: Group, lost_S: np.ndarray) -> int:
    """Return the index of the step with most waiting; the run's first steps do not count."""
    return int(np.where(group.settled_S, lost_S, -1.0).argmax())


def chosen_steps(lost_S: np.ndarray, limit: int, must: int) -> np.ndarray:
    """Return ascending indices of at most `limit` steps, int64.

    Half of them those that lost most, the rest an even sample of all, and `must` in any case. Six
    steps that lost 0, 9, 0, 0, 8, 0 with limit 4: 1 and 4 lost most, 0 and 5 are the sample.
    """
    num_steps = len(lost_S)
    if num_steps <= limit:
        return np.arange(num_steps)
    worst = np.argsort(-lost_S, kind="stable")[: limit // 2]
    chosen = dict.fromkeys([must, *worst.tolist()])
    rest = np.setdiff1d(np.arange(num_steps), list(chosen))
    room = max(0, limit - len(chosen))
    even = rest[np.linspace(0, len(rest) - 1, room).round().astype(np.int64)]
    return np.array(sorted([*list(chosen)[:limit], *even.tolist()]))


def binned(values_S: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return index and value of the largest in each of at most `num_bins` runs of neighbours."""
    edges = np.linspace(0, len(values_S), min(num_bins, len(values_S)) + 1).round().astype(np.int64)
    index = np.array(
        [
            begin + int(values_S[begin:end].argmax())
            for begin, end in zip(edges, edges[1:], strict=False)
        ]
    )
    return index, values_S[index]
