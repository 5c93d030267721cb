"""Latencies of finished requests, noted on their way to the sink, in bounded memory.

Up to `MOST` requests a rank all values are kept and percentiles are exact. Of more, a rank keeps a
sample in which each request is as likely as any other (reservoir sampling), so percentiles become
estimates: with 100,000 values the 99th stands between the true 98.9th and 99.1st.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence

import numpy as np

from engine.generation.request_source import Sink
from engine.request import Completion

MOST = 100_000

# How many values there were, and the sample of them, float64.
Taken = tuple[int, np.ndarray]


class Sample:
    """At most `most` of the values added, eight bytes each. Deterministic."""

    def __init__(self, most: int = MOST) -> None:
        self._most, self._count = most, 0
        self._values = array("d")
        self._random = random.Random(0)

    def add(self, value: float) -> None:
        """Add a value."""
        self._count += 1
        if len(self._values) < self._most:
            self._values.append(value)
        elif (place := self._random.randrange(self._count)) < self._most:
            self._values[place] = value

    def taken(self) -> Taken:
        """Return how many values were added, and a copy of those that were kept."""
        return self._count, np.array(self._values, dtype=np.float64)


def pooled(samples: Sequence[Taken]) -> np.ndarray:
    """Make one sample of several ranks', in which a rank's share is that of its requests: as large
    as the rank that kept the smallest part of its own allows.
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
    """Wrap a sink so that it notes each completion's latencies, `ttft` and `tpot`, in seconds."""

    def deliver(completions: list[Completion]) -> None:
        for item in completions:
            timing = item.timing
            if timing is None or timing.first_token is None or timing.finished is None:
                continue
            latencies["ttft"].add(timing.first_token - timing.arrived)
            if item.completion_tokens > 1:
                span = timing.finished - timing.first_token
                latencies["tpot"].add(span / (item.completion_tokens - 1))
        sink(completions)

    return deliver
