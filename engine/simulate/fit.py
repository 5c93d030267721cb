"""Fit: the costs of a model on a machine from the spans of jobs that ran there.

Every phase is fitted alone, by least squares of the relative errors with coefficients of at least
0, weighted down where the error is large: a busy machine has outliers. Experts are fitted for many
numbers of rows that take as long as reading an expert's weights, and the best is kept; so is the
time below which no call is. The links are those of the ranks that ran: what rows that leave a node
take is known only where they did.

Legend: N calls, F features, W ranks, e experts and copies on a rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from engine.profiling.phase_clock import Phase
from engine.simulate.cost_model import CostModel, ExpertLine, Hop, Line
from engine.simulate.spans import LayerCall

_ROUNDS = 8  # of weights
_LEAST = 1e-9  # seconds, of a call that counts
_ENDS = (Phase.PLAN, Phase.OTHER)  # what prepares and ends a layer
_READ_ROWS = np.concatenate(([0.0], np.geomspace(1, 4096, 73)))


def fit_costs(calls: Sequence[LayerCall], name: str, source: str, cores: int | None) -> CostModel:
    """Return the costs that explain calls best.

    Args:
        calls: of one model on one kind of device; of several sizes and loads, or the costs of what
            did not vary are not told apart.
        name: of the device.
        source: said of the costs where they are used.
        cores: that the ranks of a node shared.
    """
    ranks = [each for call in calls for each in call.ranks]
    tokens_N = np.array([each.tokens.get(Phase.ATTENTION, 0) for each in ranks], dtype=float)

    def line(*phases: Phase) -> Line:
        seconds_N = np.array([sum(each.seconds.get(p, 0.0) for p in phases) for each in ranks])
        fixed, per_token = fit_line(np.stack((np.ones_like(tokens_N), tokens_N), 1), seconds_N)
        return Line(fixed=fixed, per_token=per_token)

    return CostModel(
        name=name,
        measured=source,
        attention=line(Phase.ATTENTION),
        gate=line(Phase.GATE),
        plan=line(*_ENDS),
        experts=fit_experts(
            [np.array(each.rows_e) for each in ranks],
            np.array([each.seconds.get(Phase.EXPERTS, 0.0) for each in ranks]),
        ),
        consensus=_hop(calls, Phase.CONSENSUS),
        dispatch=_hop(calls, Phase.DISPATCH),
        combine=_hop(calls, Phase.COMBINE),
        cores=cores,
    )


def fit_line(features_NF: np.ndarray, seconds_N: np.ndarray) -> tuple[float, ...]:
    """Return the coefficients, all at least 0, with the least relative errors."""
    used_N = seconds_N > _LEAST
    features_NF, seconds_N = features_NF[used_N], seconds_N[used_N]
    count = features_NF.shape[1]
    if not len(seconds_N):
        return (0.0,) * count
    weight_N = 1 / seconds_N
    best = np.zeros(count)
    for _ in range(_ROUNDS):
        best = _non_negative(features_NF * weight_N[:, None], seconds_N * weight_N)
        error_N = np.abs(features_NF @ best / seconds_N - 1)
        usual = max(float(np.median(error_N)), 1e-6)
        weight_N = np.sqrt(1 / (1 + (error_N / (2 * usual)) ** 2)) / seconds_N
    return tuple(best.tolist())


def _non_negative(a_NF: np.ndarray, b_N: np.ndarray) -> np.ndarray:
    """Solve least squares with coefficients of at least 0, by trying which of them are not 0."""
    count = a_NF.shape[1]
    best, least = np.zeros(count), float("inf")
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            columns = list(chosen)
            found, *_ = np.linalg.lstsq(a_NF[:, columns], b_N, rcond=None)
            if (found < 0).any():
                continue
            error = float(((a_NF[:, columns] @ found - b_N) ** 2).sum())
            if error < least * (1 - 1e-9):
                least, best = error, np.zeros(count)
                best[columns] = found
    return best


def fit_experts(rows: Sequence[np.ndarray], seconds_N: np.ndarray) -> ExpertLine:
    """Return the costs of experts.

    Args:
        rows: int64 [e] of each call.
        seconds_N: of each call.
    """
    used = [
        index for index, rows_e in enumerate(rows) if rows_e.sum() and seconds_N[index] > _LEAST
    ]
    if not used:
        return ExpertLine()
    rows, seconds_N = [rows[index] for index in used], seconds_N[used]
    work_BN = _work(rows, _READ_ROWS)
    best, least_error = ExpertLine(), float("inf")
    for floor in (0.0, *np.unique(np.quantile(seconds_N, (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)))):
        above_N = seconds_N > floor * 1.1
        if above_N.sum() < max(4, len(seconds_N) // 4):
            continue
        at_floor = seconds_N[~above_N]
        least = float(np.median(at_floor)) if len(at_floor) else 0.0
        for read_rows, work_N in zip(_READ_ROWS.tolist(), work_BN, strict=True):
            features_N2 = np.stack((np.ones_like(work_N), work_N), axis=1)
            fixed, per_row = fit_line(features_N2[above_N], seconds_N[above_N])
            made = ExpertLine(least=least, fixed=fixed, per_row=per_row, read_rows=read_rows)
            predicted_N = np.maximum(least, fixed + per_row * work_N)
            error = float(np.abs(predicted_N / seconds_N - 1).mean())
            if error < least_error * (1 - 1e-3):
                best, least_error = made, error
    return best


def _work(rows: Sequence[np.ndarray], read_rows_B: np.ndarray) -> np.ndarray:
    """Return sum over experts with rows of max(rows, read_rows), float64 [B, N]."""
    most = max(len(rows_e) for rows_e in rows)
    rows_Ne = np.zeros((len(rows), most))
    for index, rows_e in enumerate(rows):
        rows_Ne[index, : len(rows_e)] = rows_e
    return np.stack(
        [np.where(rows_Ne > 0, np.maximum(rows_Ne, each), 0.0).sum(1) for each in read_rows_B]
    )


def _hop(calls: Sequence[LayerCall], phase: Phase) -> Hop:
    """Fit a collective: its time on the mean rank from the last one's arrival."""
    seconds_N, features = [], []
    for call in calls:
        if len(call.ranks) == 1:
            continue
        left = [max(0.0, e.seconds.get(phase, 0.0) - e.waited.get(phase, 0.0)) for e in call.ranks]
        seconds_N.append(float(np.mean(left)))
        features.append((1.0, float(busiest_bytes(call, phase)), float(most_rows(call, phase))))
    if not features:
        return Hop()
    alpha, beta, per_row = fit_line(np.array(features), np.array(seconds_N))
    return Hop(alpha=alpha, beta=beta, per_row=per_row)


def busiest_bytes(call: LayerCall, phase: Phase) -> int:
    """Return the bytes of the rank that sends or receives most. Of rows that are dispatched, as
    many as are combined come back, so what one of the two sends the other receives.
    """
    phases = (phase,) if phase == Phase.CONSENSUS else (Phase.DISPATCH, Phase.COMBINE)
    return max(each.num_bytes.get(kind, 0) for each in call.ranks for kind in phases)


def most_rows(call: LayerCall, phase: Phase) -> int:
    """Return the rows of the rank with most in a collective; 0 in the consensus."""
    if phase == Phase.CONSENSUS:
        return 0
    return max(each.tokens.get(phase, 0) for each in call.ranks)
