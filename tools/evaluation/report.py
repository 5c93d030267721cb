"""The table and the record of an evaluation: one column per case."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from bench.report import table

from engine.interop.lm_eval_usage import Usage
from evaluation.scores import Score

LEGEND = """\
+-              standard error of the score, over questions or texts
dropped         share of the assignments under capacity that was dropped
speed bound     most loaded rank's rows before capacity over those after it: MoE layers at most so
                much faster
mean/slowest    mean rank's rows before capacity over the most loaded rank's after it"""


@dataclass(frozen=True, slots=True)
class Result:
    """One case's run."""

    value: str | None  # of the swept setting
    scores: list[Score]
    usage: Usage
    seconds: float  # wall time, the harness included

    def record(self) -> dict[str, Any]:
        """Return it for the JSON line."""
        scores: dict[str, Any] = {}
        for score in self.scores:
            value = score.value if isfinite(score.value) else None
            scores.setdefault(score.task, {})[score.metric] = {"value": value, "error": score.error}
        usage = self.usage
        return {
            "value": self.value,
            "scores": scores,
            **asdict(usage),
            "drop_rate": usage.drop_rate,
            "speed_bound": usage.speed_bound,
            "share_after": usage.share_after,
            "wall_seconds": self.seconds,
        }


def make_folder(path: Path) -> None:
    """Make the folder of --out, before anything runs whose results it is for.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {path}: cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise ValueError(f"--out {path}: cannot be written to; name another folder")


def report_text(head: str, key: str | None, results: Sequence[Result]) -> str:
    """Return a title, the table and the legend.

    Args:
        head: the title.
        key: the swept setting; None: there is one result.
        results: all with the same tasks.
    """
    header = ["task", "metric"]
    for result in results:
        header += ["score" if result.value is None else result.value, "+-"]
    rows: list[list[Any]] = []
    last = ""
    for place, first in enumerate(results[0].scores):
        row = [first.task if first.task != last else "", first.metric]
        for result in results:
            score = result.scores[place]
            assert (score.task, score.metric) == (first.task, first.metric)
            error = None if score.error is None else f"{score.error:.4f}"
            row += [f"{score.value:.4f}", error]
        rows.append(row)
        last = first.task
    for name, show in (
        ("dropped", lambda usage: f"{100 * usage.drop_rate:.1f}%"),
        ("speed bound", lambda usage: f"{usage.speed_bound:.2f}"),
        ("mean/slowest", lambda usage: f"{usage.share_after:.2f}"),
    ):
        cells = [cell for result in results for cell in (show(result.usage), "")]
        rows.append(["MoE layers" if name == "dropped" else "", name, *cells])
    title = head if key is None else f"{head}; {key} ="
    return f"{title}\n{table(header, rows, left=(0, 1))}\n\n{LEGEND}"
