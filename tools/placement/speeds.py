"""Speeds of ranks from a file, as times per row.

YAML or JSON, with one of the keys

    speeds: [1, 1, 1, 0.5]         # rows per second of each rank, in any unit
    row_times: [1, 1, 1, 2]        # the inverse
    curves:                        # seconds of each rank for so many rows
      - {rows: [64, 1024, 8192], seconds: [0.001, 0.004, 0.03]}

or the report of a job with `profiler.enabled`, whose `run.ranks[].expert_cost` has what each rank's
calls of experts cost. A curve counts by its time at the rows that the rank would have if all were
equal, linear between its points, and beyond them with the time per row of the last. In a report a
rank's curve counts by its time for the calls of all ranks together, and ranks within 5% of the
fastest count as equal.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine.profiling.cost_model import price

_KEYS = ("speeds", "row_times", "curves")
_EQUAL = 1.05  # of the fastest rank's time: measured ranks that are equal differ by less


def read_row_times(path: Path, num_ranks: int, rows: float) -> tuple[float, ...]:
    """Return the time per row of each rank over the fastest's.

    Args:
        path: of the file.
        num_ranks: ranks there must be.
        rows: of a rank per step, at which curves are read.

    Raises:
        ValueError: naming the file and what to do.
    """
    try:
        text = path.read_text(encoding="utf-8")
        data: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"--speeds {path}: cannot be read: {text}") from error
    if isinstance(data, Mapping) and "run" in data:
        return _from_report(path, data["run"], num_ranks)
    if not isinstance(data, Mapping) or len(data) != 1 or next(iter(data)) not in _KEYS:
        raise ValueError(
            f"--speeds {path}: must have one key of {', '.join(_KEYS)}, or be the report of a job"
        )
    key, values = next(iter(data.items()))
    if not isinstance(values, list) or len(values) != num_ranks:
        raise ValueError(
            f"--speeds {path}: {key} must be a list, one for each of {num_ranks} ranks"
        )
    try:
        if key == "curves":
            times = [_at(each, rows) for each in values]
        else:
            times = [float(each) if key == "row_times" else 1 / float(each) for each in values]
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"--speeds {path}: {key} has an entry that is none: {error}") from error
    if not all(np.isfinite(each) and each > 0 for each in times):
        raise ValueError(f"--speeds {path}: {key} must be above 0")
    return tuple(each / min(times) for each in times)


def _from_report(path: Path, run: Any, num_ranks: int) -> tuple[float, ...]:
    """Return the time per row of each rank over the fastest's, from a report's `run`."""
    ranks = run.get("ranks") if isinstance(run, Mapping) else None
    if not isinstance(ranks, Sequence) or len(ranks) != num_ranks:
        found = len(ranks) if isinstance(ranks, Sequence) else "no"
        raise ValueError(
            f"--speeds {path}: the job had {found} ranks, the plan is for {num_ranks}; give the "
            "report of a job on as many ranks"
        )
    tables = []
    for rank, each in enumerate(ranks):
        try:
            cost = each["expert_cost"]
            calls, rows, seconds = (
                np.array(cost[name], dtype=float) for name in ("calls", "rows", "seconds")
            )
            tables.append(np.stack((calls, rows * calls, seconds * calls)))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"--speeds {path}: run.ranks[{rank}].expert_cost is missing or damaged; give the "
                "report of a job with profiler.enabled in which every rank's experts had rows"
            ) from error
    calls = np.concatenate(tables, axis=1)
    times = [price(calls, [table]) for table in tables]
    if not all(np.isfinite(each) and each > 0 for each in times):
        raise ValueError(f"--speeds {path}: expert_cost has no times above 0; give another report")
    over = [each / min(times) for each in times]
    return tuple(1.0 if each < _EQUAL else each for each in over)


def _at(curve: Mapping[str, Any], rows: float) -> float:
    """Return the time per row at so many rows."""
    at, seconds = (np.array(curve[name], dtype=float) for name in ("rows", "seconds"))
    if len(at) != len(seconds) or not len(at) or (np.diff(at) <= 0).any() or at[0] <= 0:
        raise ValueError("rows must ascend and have a time each")
    if rows >= at[-1]:
        return float(seconds[-1] / at[-1])
    return float(np.interp(rows, at, seconds) / max(rows, 1e-9))
