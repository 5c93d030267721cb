"""Comparison of two runs. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from straggler.aggregate import Loads, Times
from straggler.run import Group


@dataclass(frozen=True, slots=True)
class Measures:
    """One run's sums of loads and times."""

    group: Group
    times: Times
    loads: Loads


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the comparison."""

    name: str
    unit: str
    values: tuple[float | str | None, float | str | None]  # per run; None: it has none
    bars: bool = False  # whether the pair is also drawn


def compare(one: Measures, other: Measures) -> list[Row]:
    """Return the lines; times of phases are those of a mean rank without waiting."""
    both = one, other

    def row(name: str, unit: str, values: list[float | str | None], bars: bool = False) -> Row:
        return Row(name, unit, (values[0], values[1]), bars)

    waiting = [_per_step(each, each.times.waiting_WP.sum(1)) for each in both]
    rows = [
        row("ranks", "", [len(each.group.ranks) for each in both]),
        row("capacity policy", "", [each.group.ranks[0].header.policy for each in both]),
        row("steps", "", [len(each.group.steps_S) for each in both]),
        row("time of the steps", "s", [each.times.wall for each in both]),
        row("tokens per second", "1/s", [each.times.tokens_per_second for each in both]),
        row("step, median", "ms", [_percentile(each, 50) for each in both]),
        row("step, 95th percentile", "ms", [_percentile(each, 95) for each in both]),
        row("waiting, of the time", "%", [100 * each.times.waiting_share for each in both]),
        row("waiting", "ms per step", [*waiting], bars=True),
    ]
    for name in dict.fromkeys((*one.group.phases, *other.group.phases)):
        values = [_phase(each, name) for each in both]
        if any(values):
            rows.append(row(name, "ms per step", values, bars=True))
    for place, when in enumerate(("before capacity", "after capacity")):
        values = [_number(each.loads.imbalance_2[place]) for each in both]
        rows.append(row(f"most loaded rank over mean, {when}", "x", values))
    return rows


def _percentile(measures: Measures, point: float) -> float:
    return 1e3 * float(np.percentile(measures.times.length_S, point))


def _per_step(measures: Measures, seconds_W: np.ndarray) -> float:
    """Return milliseconds per step of a mean rank."""
    return 1e3 * float(seconds_W.mean()) / len(measures.group.steps_S)


def _phase(measures: Measures, name: str) -> float | None:
    if name not in measures.group.phases:
        return None
    index, times = measures.group.phases.index(name), measures.times
    return _per_step(measures, (times.seconds_WP - times.waiting_WP)[:, index])


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
