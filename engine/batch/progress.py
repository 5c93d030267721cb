"""What a batch job shows: its progress on rank 0 while it runs, a summary at the end.

ProgressBar goes to stderr: a bar on a terminal, elsewhere a line every few seconds. The summary,
and the same figures as JSON beside the output, come from the engine's `RunReport` and from what the
job counted itself. The last table is the straggler's: the slowest rank sets the time of all.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from engine.profiling.report import StepReport
from engine.reporting.summary import _short

_LINE_EVERY_S = 5.0
_BAR_EVERY_S = 0.2
_RATE_OVER_S = 5.0


class ProgressBar:
    """Shows how far a job is; call `update` after every step. A context manager.

    total: requests of the job. resumed: those done by an earlier run. num_done: asked for when
    something is shown: requests that this run has made durable, on all ranks.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        resumed: int,
        num_done: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._total = total
        self._resumed = resumed
        self._num_done = num_done
        self._clock = clock
        self._began = clock()
        self._shown = self._began
        self._tokens = (0, 0)  # prefill, decode
        self._samples: deque[tuple[float, int, int]] = deque([(self._began, 0, 0)])
        self._bar: Bar | None = None
        if console.is_terminal:
            self._bar = Bar(
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
        """Count a step; show something when it is time."""
        prefill, decode = self._tokens
        self._tokens = (prefill + report.tokens_prefill, decode + report.tokens_decode)
        now = self._clock()
        if now - self._shown >= (_LINE_EVERY_S if self._bar is None else _BAR_EVERY_S):
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
        """Tokens a second, prefill and decode, over the last few seconds."""
        while len(self._samples) > 1 and now - self._samples[1][0] >= _RATE_OVER_S:
            self._samples.popleft()
        then, prefill, decode = self._samples[0]
        self._samples.append((now, self._tokens[0], self._tokens[1]))
        seconds = max(now - then, 1e-9)
        return (self._tokens[0] - prefill) / seconds, (self._tokens[1] - decode) / seconds
