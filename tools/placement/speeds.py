"""Speeds of ranks from a file, as times per row.

YAML or JSON, with one of the keys

    speeds: [1, 1, 1, 0.5]         # rows per second of each rank, in any unit
    row_times: [1, 1, 1, 2]        # the inverse
    curves:                        # seconds of each rank for so many rows
      - {rows: [64, 1024, 8192], seconds: [0.001, 0.004, 0.03]}

A curve counts by its time at the rows that the rank would have if all were equal, linear between
its points, and beyond them with the time per row of the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

_KEYS = ("speeds", "row_times", "curves")


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
        data: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"--speeds {path}: cannot be read: {text}") from error
    if not isinstance(data, Mapping) or len(data) != 1 or next(iter(data)) not in _KEYS:
        raise ValueError(f"--speeds {path}: must have one key of {', '.join(_KEYS)}")
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


def _at(curve: Mapping[str, Any], rows: float) -> float:
    """Return the time per row at so many rows."""
    at, seconds = (np.array(curve[name], dtype=float) for name in ("rows", "seconds"))
    if len(at) != len(seconds) or not len(at) or (np.diff(at) <= 0).any() or at[0] <= 0:
        raise ValueError("rows must ascend and have a time each")
    if rows >= at[-1]:
        return float(seconds[-1] / at[-1])
    return float(np.interp(rows, at, seconds) / max(rows, 1e-9))
