"""Latencies of finished requests, noted on their way to the sink."""

from __future__ import annotations

from engine.loop import Sink
from engine.request import Completion


def timed(sink: Sink, latencies: dict[str, list[float]]) -> Sink:
    """Wrap a sink so that it notes each completion's latencies, in seconds."""

    def deliver(completions: list[Completion]) -> None:
        for item in completions:
            timing = item.timing
            if timing is None or timing.first_token is None or timing.finished is None:
                continue
            latencies["ttft"].append(timing.first_token - timing.arrived)
            if item.completion_tokens > 1:
                span = timing.finished - timing.first_token
                latencies["tpot"].append(span / (item.completion_tokens - 1))
        sink(completions)

    return deliver
