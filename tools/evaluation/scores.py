"""Scores: the harness's results with the standard errors that it leaves out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite, log, sqrt
from typing import Any


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task."""

    task: str  # or group
    metric: str  # with the filter's name behind it, where there is one
    value: float
    error: float | None  # standard error; None: unknown


def read_scores(results: Mapping[str, Any]) -> list[Score]:
    """Return all scores of `simple_evaluate`'s results, tasks in its order."""
    scores = []
    samples = results.get("samples") or {}
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not filter_name or metric.endswith("_stderr") or not is_number:
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            if not isinstance(error, int | float):
                error = ratio_error(metric, [each[metric] for each in samples.get(task, ())])
            name = metric if filter_name == "none" else f"{metric} ({filter_name})"
            known = error is not None and isfinite(error)
            scores.append(Score(task, name, float(value), float(error) if known else None))
    return scores


def ratio_error(metric: str, samples: Sequence[Any]) -> float | None:
    """Return the standard error of a perplexity over texts of different lengths.

    The texts are the sample: a perplexity is a function of R = sum(log likelihoods) / sum(lengths),
    whose variance is that of log likelihood - R * length over the texts (linearised).

    Args:
        metric: word_perplexity, byte_perplexity or bits_per_byte; of others the error is unknown.
        samples: log likelihood and length of each text.
    """
    if metric not in ("word_perplexity", "byte_perplexity", "bits_per_byte") or len(samples) < 2:
        return None
    total, count = sum(length for _, length in samples), len(samples)
    ratio = sum(value for value, _ in samples) / total
    squares = sum((value - ratio * length) ** 2 for value, length in samples)
    error = sqrt(squares * count / (count - 1)) / total
    return error / log(2) if metric == "bits_per_byte" else error * exp(-ratio)
