"""Data of the page as plain JSON: sums over all steps, and the spans of some steps.

Times of spans count tenths of a microsecond from the step's begin, which is when the first rank
began it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from straggler.aggregate import Loads, Times, binned, chosen_steps, worst_step
from straggler.compare import Measures, compare
from straggler.report import JobReport
from straggler.run import DURATION, OFFSET, WAITED, Group

MAX_STEPS = 400
# About 10 MB of page.
MAX_SPANS = 300_000
MAX_COPIES = 40
_BINS = 400
_TICK_NS = 100


def page_data(
    measures: Measures,
    sentence: str,
    *,
    report: JobReport | None = None,
    other: Measures | None = None,
    step: int | None = None,
    max_steps: int = MAX_STEPS,
    max_spans: int = MAX_SPANS,
) -> dict[str, Any]:
    """Return everything that the page's script needs.

    Args:
        sentence: the finding from the spans, shown where there is none in a report.
        other: the run to compare with.
        step: the step to show first, by default the one with most waiting.

    Raises:
        ValueError: a step that the ranks do not all have.
    """
    group, times, loads = measures.group, measures.times, measures.loads
    shown = worst_step(group, times.lost_S) if step is None else index_of(group, step)
    findings = report.findings if report is not None else []
    notes = list(group.notes)
    if report is not None and other is not None:
        notes.append(f"The report's figures are those of {group.name}.")
    if report is not None and 0 not in group.ranks[0].header.group:
        notes.append("The report's findings and drop rates are those of rank 0's group.")
    return {
        "run": group.name,
        "subtitle": _subtitle(group, times),
        "notes": notes,
        "findings": findings or [sentence],
        "source": "the job's report" if findings else "computed from the spans",
        "facts": [] if report is None else report.facts,
        "phases": list(group.phases),
        "ranks": [[rank.header.rank, rank.header.host] for rank in group.ranks],
        "overview": _overview(group, times),
        "steps": _steps(group, times, shown, max_steps, max_spans),
        "totals": _totals(times),
        "loads": _loads(group, loads),
        "layers": _layers(times),
        "drops": _drops(loads, report),
        "compare": None if other is None else _compare(measures, other),
    }


def index_of(group: Group, step: int) -> int:
    """Return the index of a step.

    Raises:
        ValueError: not all ranks have it.
    """
    steps = group.steps_S
    index = int(np.searchsorted(steps, step))
    if index == len(steps) or steps[index] != step:
        raise ValueError(
            f"--step {step}: not among the steps that all ranks of {group.name} have; choose one "
            f"from {steps[0]} to {steps[-1]}"
        )
    return index


def _subtitle(group: Group, times: Times) -> str:
    header = group.ranks[0].header
    hosts = len({rank.header.host for rank in group.ranks})
    steps, error = group.steps_S, max(rank.header.clock_error_ns for rank in group.ranks)
    return (
        f"{_count(len(group.ranks), 'rank')} on {_count(hosts, 'host')}, "
        f"{_count(len(steps), 'step')} ({steps[0]:,} to {steps[-1]:,}) in {times.wall:,.2f} s, "
        f"{times.tokens_per_second:,.0f} tokens per second, capacity policy {header.policy}, "
        f"clocks agree within {error / 1e3:,.1f} \u00b5s"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _overview(group: Group, times: Times) -> dict[str, Any]:
    index, lost = binned(times.lost_S, _BINS)
    return {
        "step": group.steps_S[index].tolist(),
        "lost": _rounded(lost),
        "length": _rounded(times.length_S[index]),
        "num_steps": len(group.steps_S),
    }


def _steps(
    group: Group, times: Times, shown: int, max_steps: int, max_spans: int
) -> dict[str, Any]:
    num_spans = sum(len(rank.table_N7) for rank in group.ranks) / len(group.steps_S)
    limit = max(2, min(max_steps, int(max_spans / num_spans)))
    chosen = chosen_steps(times.lost_S, limit, shown)
    begin_ns = group.begin_ns
    return {
        "shown": int(np.searchsorted(chosen, shown)),
        "number": group.steps_S[chosen].tolist(),
        "lost": _rounded(times.lost_S[chosen]),
        "length": _rounded(times.length_S[chosen]),
        "tokens": [[rank.tokens_S2[index].tolist() for rank in group.ranks] for index in chosen],
        "spans": [
            [
                _ticks(rank.spans(index), int(rank.starts_S[index] - begin_ns[index]))
                for rank in group.ranks
            ]
            for index in chosen.tolist()
        ],
    }


def _ticks(table_n7: np.ndarray, start_ns: int) -> list[int]:
    """Return one rank's step, 7 numbers per span, one after the other."""
    ticks = table_n7.copy()
    # Ends are rounded, not durations, so that spans still touch.
    begins = ticks[:, OFFSET] + start_ns
    ends = begins + ticks[:, DURATION]
    ticks[:, OFFSET] = begins // _TICK_NS
    ticks[:, DURATION] = ends // _TICK_NS - ticks[:, OFFSET]
    waited = ticks[:, WAITED]
    ticks[:, WAITED] = np.where(waited < 0, -1, np.minimum(waited // _TICK_NS, ticks[:, DURATION]))
    return ticks.ravel().tolist()


def _totals(times: Times) -> dict[str, Any]:
    return {
        "seconds": _rounded(times.seconds_WP),
        "waiting": _rounded(times.waiting_WP),
        "tokens": times.tokens_WP.tolist(),
        "bytes": times.bytes_WP.tolist(),
        "calls": times.calls_WP.tolist(),
    }


def _loads(group: Group, loads: Loads) -> dict[str, Any]:
    held = [[rank.header.held[layer] for layer in loads.layers] for rank in group.ranks]
    places = range(len(loads.layers))
    homes = [{expert for of_rank in held for expert in of_rank[at].homes} for at in places]
    return {
        "layers": loads.layers,
        # Rank by rank and layer by layer: its experts, how many of them are homes, their rows.
        "experts": [[each.experts for each in of_rank] for of_rank in held],
        "num_homes": [[each.num_homes for each in of_rank] for of_rank in held],
        "rows": [[rank.after(at).tolist() for at in places] for rank in group.ranks],
        # Experts whose home is on a rank without files, layer by layer.
        "missing": [[e for e in range(loads.before_LE.shape[1]) if e not in own] for own in homes],
        "by_rank": [
            {"homes": int(of_homes.sum()), "copies": int(of_copies.sum())}
            for of_homes, of_copies in zip(loads.homes_WL, loads.copies_WL, strict=True)
        ],
        "copies": _copies(group, loads),
        "before": loads.before_LE.tolist(),
        "after": loads.after_LE.tolist(),
        "imbalance": [
            [None if np.isnan(value) else round(value, 4) for value in row]
            for row in loads.imbalance_L2.tolist()
        ],
    }


def _copies(group: Group, loads: Loads) -> list[dict[str, Any]]:
    """Return the copies that computed most rows, with the rank of their expert's home."""
    found: list[dict[str, Any]] = []
    for place, layer in enumerate(loads.layers):
        home = {
            expert: rank.header.rank
            for rank in group.ranks
            for expert in rank.header.held[layer].homes
        }
        for rank in group.ranks:
            held, rows = rank.header.held[layer], rank.after(place).tolist()
            found += [
                {
                    "layer": layer,
                    "expert": expert,
                    "rank": rank.header.rank,
                    "home": home.get(expert),
                    "rows": count,
                    "of": max(0, int(loads.after_LE[place, expert])),
                }
                for expert, count in zip(held.copies, rows[held.num_homes :], strict=True)
            ]
    return sorted(found, key=lambda each: -each["rows"])[:MAX_COPIES]


def _layers(times: Times) -> dict[str, Any]:
    used = np.flatnonzero(times.lost_DP.any(1))
    # Includes layers without waiting between others; the first row is outside of the layers.
    rows = np.arange(len(times.lost_DP)) if len(used) else used
    return {"layer": (rows - 1).tolist(), "lost": _rounded(times.lost_DP[rows])}


def _drops(loads: Loads, report: JobReport | None) -> dict[str, Any]:
    if report is not None:
        return {
            "source": "the job's report; of the assignments subject to capacity",
            "layers": [asdict(drops) for drops in report.drops],
        }
    return {
        "source": "rows before and after capacity; of all rows, extras counted against drops",
        "layers": [
            {"layer": layer, "drop_rate": round(rate, 6)}
            for layer, rate in zip(loads.layers, loads.drop_rate_L.tolist(), strict=True)
        ],
    }


def _compare(one: Measures, other: Measures) -> dict[str, Any]:
    return {
        "names": [one.group.name, other.group.name],
        "notes": other.group.notes,
        "rows": [asdict(row) for row in compare(one, other)],
    }


def _rounded(values: np.ndarray) -> Any:
    return np.round(values, 7).tolist()
