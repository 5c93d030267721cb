"""Output of a bench: a table to read, then one JSON line to collect."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], left: Sequence[int] = (0,)
) -> str:
    """Return rows under a header: the columns in `left` aligned left, the others right."""
    cells = [[*map(str, header)], *([*map(cell, row)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            text.ljust(width) if index in left else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def cell(value: object) -> str:
    """Return a value's text: '-' for None, thousands separated, three digits below 100."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, extremes and all values of repeated measurements, for the JSON line."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": list(values),
    }


# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
_T95 += [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]
_T95 += [2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


def mean_interval(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, 95% confidence interval (Student's t) and all of repeated measurements.

    Raises:
        ValueError: fewer than two values.
    """
    freedom = len(values) - 1
    if freedom < 1:
        raise ValueError(f"a confidence interval needs at least 2 values, not {len(values)}")
    t95 = _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.4 / freedom
    mean = statistics.mean(values)
    margin = t95 * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - margin, "high": mean + margin, "all": list(values)}


def emit(text: str, record: Mapping[str, Any], out: Path | None = None, name: str = "") -> None:
    """Print the table, then the record as one JSON line; write both to folder `out` if given."""
    line = json.dumps(record, allow_nan=False)
    print(f"{text}\n\n{line}", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
        (out / f"{name}.json").write_text(line + "\n", encoding="utf-8")
