"""What a batch job shows: its progress on rank 0 while it runs, a summary at the end.

Progress goes to stderr: a bar on a terminal, elsewhere a line every few seconds. The summary, and
the same figures as JSON beside the output, come from the engine's `RunReport` and from what the job
counted itself. The last table is the straggler's: the slowest rank sets the time of all.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from engine.capacity_summary import print_capacity
from engine.comms_summary import print_comms
from engine.config import CapacityConfig
from engine.profiling.report import RunReport, StepReport
from engine.straggler_summary import print_stragglers

_WIDTH = 100
_LINE_EVERY_S = 5.0
_BAR_EVERY_S = 0.2
_RATE_OVER_S = 5.0
_HEADINGS = {"communication": "communi-\ncation"}


def make_console(**options: Any) -> Console:
    """Return a console; into a file or a pipe it writes lines of a width that the tables need."""
    console = Console(**options)
    if not console.is_terminal:
        console.width = _WIDTH
    return console


class Progress:
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

    def __enter__(self) -> Progress:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A finished job. requests, prompt_tokens and generated_tokens are this run's alone.

    total: requests of the job. resumed: done by earlier runs. errors: error records in the output.
    run: what the engine measured, None where nothing was left to run. capacity: the policy it ran
    under.
    """

    total: int
    resumed: int
    errors: int
    requests: int
    prompt_tokens: int
    generated_tokens: int
    run: RunReport | None
    capacity: CapacityConfig = field(default_factory=CapacityConfig)

    def to_json(self) -> str:
        """Everything as JSON, latencies as percentiles."""
        values: dict[str, Any] = {
            key: getattr(self, key)
            for key in self.__dataclass_fields__
            if key not in ("run", "capacity")
        }
        values["capacity"] = asdict(self.capacity)
        if self.run is not None:
            values["run"] = asdict(self.run) | {"latencies": percentiles(self.run)}
        return json.dumps(values, indent=2) + "\n"


def percentiles(run: RunReport) -> dict[str, dict[str, float]]:
    """The 50th and 99th percentile of each latency that has values; in seconds."""
    return {
        name: {
            "p50": float(np.percentile(values, 50)),
            "p99": float(np.percentile(values, 99)),
        }
        for name, values in run.latencies.items()
        if len(values)
    }


def print_summary(console: Console, summary: Summary) -> None:
    """Print throughput, latency and where each rank's time went."""
    run = summary.run
    if run is not None:
        console.print(_throughput(summary, run))
        if latencies := percentiles(run):
            console.print(_latency(latencies))
        console.print(_ranks(run))
        print_capacity(console, run, summary.capacity)
        print_stragglers(console, run)
        print_comms(console, run)
    words = [f"{summary.total} requests"]
    if summary.resumed:
        words.append(f"{summary.resumed} of them by earlier runs")
    if summary.errors:
        words.append(f"{summary.errors} with an error record")
    console.print(", ".join(words) + ".", highlight=False)


def _throughput(summary: Summary, run: RunReport) -> Table:
    seconds = max(run.seconds, 1e-9)
    table = _table("Throughput", "count", "per second")
    for name, count in (
        ("requests", summary.requests),
        ("prompt tokens", summary.prompt_tokens),
        ("generated tokens", summary.generated_tokens),
    ):
        table.add_row(name, f"{count:,}", f"{count / seconds:,.1f}")
    table.caption = f"{run.seconds:.2f} s, {run.steps} steps, max/mean load {run.max_over_mean:.2f}"
    return table


def _latency(latencies: dict[str, dict[str, float]]) -> Table:
    table = _table("Latency", "p50", "p99")
    for key, name in (("ttft", "time to first token"), ("tpot", "time per later token")):
        if key in latencies:
            table.add_row(name, *(_duration(latencies[key][point]) for point in ("p50", "p99")))
    return table


def _ranks(run: RunReport) -> Table:
    kinds = list(dict.fromkeys(kind for rank in run.ranks for kind in rank.seconds))
    counted = ("host", "prefill\ntokens", "decode\ntokens", "expert\nrows")
    timed = [_HEADINGS.get(kind, kind) for kind in kinds]
    table = _table("Rank", *counted, *timed)
    for rank in run.ranks:
        counts = (rank.tokens_prefill, rank.tokens_decode, rank.expert_rows)
        table.add_row(
            str(rank.rank),
            rank.host,
            *(f"{count:,}" for count in counts),
            *(f"{rank.seconds.get(kind, 0.0):.2f}" for kind in kinds),
        )
    table.caption = "seconds in each kind of work"
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption_justify="left")
    for place, column in enumerate(columns):
        words = place == 0 or column == "host"
        table.add_column(column, justify="left" if words else "right", vertical="bottom")
    return table


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
