"""Latencies of finished requests, recorded in bounded memory.

Up to `MAX_VALUES` requests per rank all values are kept and percentiles are exact. Of more, a rank
keeps a uniform sample (reservoir sampling), so percentiles become estimates: with 100,000 values
the 99th is between the true 98.9th and 99.1st.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from engine.generation.request_source import Sink
from engine.request import Completion

MAX_VALUES = 100_000

Sampled = tuple[int, np.ndarray]  # number of values added; the sample of them, float64


class Sample:
    """A uniform sample of at most `max_values` of the values added. Deterministic."""

    def __init__(self, max_values: int = MAX_VALUES) -> None:
        self._max_values, self._count = max_values, 0
        self._values = array("d")
        self._random = random.Random(0)

    def add(self, value: float) -> None:
        """Add a value."""
        self._count += 1
        if len(self._values) < self._max_values:
            self._values.append(value)
        elif (index := self._random.randrange(self._count)) < self._max_values:
            self._values[index] = value

    def sampled(self) -> Sampled:
        """Return the number of values added, and a copy of those that were kept."""
        return self._count, np.array(self._values, dtype=np.float64)


def pooled(samples: Sequence[Sampled]) -> np.ndarray:
    """Join the ranks' samples into one, in which every request is equally likely.

    Its sampling rate is that of the rank that kept the smallest part of its values.
    """
    rate = min((len(values) / count for count, values in samples if count), default=1.0)
    rng = np.random.default_rng(0)
    parts = [np.empty(0)]
    for count, values in samples:
        wanted = min(len(values), round(count * rate))
        if wanted < len(values):
            values = values[np.sort(rng.choice(len(values), wanted, replace=False))]
        parts.append(values)
    return np.concatenate(parts)


def timed(sink: Sink, latencies: Mapping[str, Sample]) -> Sink:
    """Wrap a sink so that each completion's latencies, `ttft` and `tpot`, are added, in seconds."""

    def deliver(completions: list[Completion]) -> None:
        for item in (choice for each in completions for choice in each.choices):
            timing = item.timing
            if timing is None or timing.first_token is None or timing.finished is None:
                continue
            latencies["ttft"].add(timing.first_token - timing.arrived)
            if item.completion_tokens > 1:
                span = timing.finished - timing.first_token
                latencies["tpot"].add(span / (item.completion_tokens - 1))
        sink(completions)

    return deliver
