"""Counts of a run: those of one rank, and after each step those of all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from engine.generation.control import ControlMessage
from engine.profiling.report import StepReport

OnStep = Callable[[StepReport], None]


@dataclass(slots=True)
class Totals:
    """Counts of one rank over a run; tokens and requests on the first rank of a tensor group."""

    steps: int = 0
    tokens_prefill: int = 0
    tokens_decode: int = 0
    finished: int = 0  # requests, failed ones included
    surplus_rows: int = 0  # of sequences that had ended, not in tokens_decode (`late/late_step.py`)


def step_report(
    step: int, messages: list[ControlMessage], max_over_mean: float, started_at: float
) -> StepReport:
    """Add up the ranks' messages; `started_at` is the run's start on the monotonic clock."""
    return StepReport(
        step=step,
        tokens_prefill=sum(message.tokens_prefill for message in messages),
        tokens_decode=sum(message.tokens_decode for message in messages),
        running=sum(message.running for message in messages),
        waiting=sum(message.waiting for message in messages),
        finished=sum(message.finished for message in messages),
        max_over_mean=max_over_mean,
        elapsed=time.monotonic() - started_at,
    )
