"""Progress bar of a batch job, shown on rank 0 while it runs.

Goes to stderr: a bar on a terminal, elsewhere a line every few seconds. The summary at the end is
`reporting/summary.py`'s.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from engine.profiling.report import StepReport

_LINE_INTERVAL_S = 5.0
_BAR_INTERVAL_S = 0.2
_RATE_WINDOW_S = 5.0


class ProgressBar:
    """Shows how many requests of a job are done, and its token rates. A context manager."""

    def __init__(
        self,
        console: Console,
        total: int,
        resumed: int,
        num_done: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show nothing yet.

        Args:
            console: where to print; a bar if it is a terminal.
            total: requests of the job.
            resumed: of these, done by earlier runs.
            num_done: returns how many requests this run has made durable, on all ranks; called
                only when something is shown.
            clock: returns seconds.
        """
        self._console = console
        self._total = total
        self._resumed = resumed
        self._num_done = num_done
        self._clock = clock
        self._began = clock()
        self._shown = self._began
        self._tokens = (0, 0)  # prefill, decode
        self._samples: deque[tuple[float, int, int]] = deque([(self._began, 0, 0)])
        self._bar: RichProgress | None = None
        if console.is_terminal:
            self._bar = RichProgress(
                TextColumn("requests"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rates]}"),
                TimeElapsedColumn(),
                console=console,
                auto_refresh=False,
            )
            self._task = self._bar.add_task("", total=total, completed=resumed, rates="")

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, report: StepReport) -> None:
        """Add a step's tokens; refresh the display if the interval has passed."""
        prefill, decode = self._tokens
        self._tokens = (prefill + report.tokens_prefill, decode + report.tokens_decode)
        now = self._clock()
        if now - self._shown >= (_LINE_INTERVAL_S if self._bar is None else _BAR_INTERVAL_S):
            self._shown = now
            self._show(now, report.max_over_mean)

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def _show(self, now: float, max_over_mean: float) -> None:
        done = self._resumed + self._num_done()
        prefill, decode = self._rates(now)
        rates = (
            f"prefill {_short(prefill)} tok/s, decode {_short(decode)} tok/s, "
            f"max/mean load {max_over_mean:.2f}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rates=rates, refresh=True)
        else:
            seconds = now - self._began
            line = f"{done}/{self._total} requests, {rates}, {seconds:.0f} s"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _rates(self, now: float) -> tuple[float, float]:
        """Return tokens per second, prefill and decode, over the last few seconds."""
        while len(self._samples) > 1 and now - self._samples[1][0] >= _RATE_WINDOW_S:
            self._samples.popleft()
        then, prefill, decode = self._samples[0]
        self._samples.append((now, self._tokens[0], self._tokens[1]))
        seconds = max(now - then, 1e-9)
        return (self._tokens[0] - prefill) / seconds, (self._tokens[1] - decode) / seconds


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
