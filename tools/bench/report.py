"""What a bench prints: a table for the reader, then one JSON line for whoever collects figures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], left: Sequence[int] = (0,)
) -> str:
    """Lay out rows under a header: the columns in `left` to the left, the others to the right."""
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
    """Text of one value: '-' for None, thousands separated, three significant digits below 100."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all values of repeated measurements, for the JSON line."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": list(values),
    }


def emit(text: str, record: Mapping[str, Any], out: Path | None = None, name: str = "") -> None:
    """Print the table, then the record as one JSON line; write both to folder `out` if given."""
    line = json.dumps(record, allow_nan=False)
    print(f"{text}\n\n{line}", flush=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
        (out / f"{name}.json").write_text(line + "\n", encoding="utf-8")
