"""The progress bar: what a job prints while it runs, on a terminal and elsewhere."""

import io

from rich.console import Console

from engine.batch.progress import ProgressBar
from engine.profiling.report import StepReport


def step(number: int, prefill: int = 0, decode: int = 0) -> StepReport:
    return StepReport(
        step=number,
        tokens_prefill=prefill,
        tokens_decode=decode,
        running=1,
        waiting=0,
        finished=0,
        max_over_mean=1.25,
        elapsed=0.0,
    )


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=120, **options)


def printed(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_line_appears_every_five_seconds():
    out, clock = console(), Clock()
    with ProgressBar(out, total=10, resumed=2, num_done=lambda: 3, clock=clock) as progress:
        for number in range(12):
            clock.now += 1
            progress.update(step(number, prefill=1000, decode=50))
    first, second = printed(out).splitlines()
    assert first == ("5/10 requests, prefill 1.0k tok/s, decode 50 tok/s, max/mean load 1.25, 5 s")
    assert second.endswith("10 s")


def test_rates_are_of_the_last_seconds_only():
    out, clock = console(), Clock()
    progress = ProgressBar(out, total=10, resumed=0, num_done=lambda: 0, clock=clock)
    for number in range(20):
        clock.now += 1
        progress.update(step(number, prefill=100 if number < 10 else 0, decode=7))
    last = printed(out).splitlines()[-1]
    assert "prefill 0 tok/s, decode 7 tok/s" in last


def test_num_done_is_called_only_when_something_is_shown():
    calls = []
    clock = Clock()
    progress = ProgressBar(console(), 10, 0, lambda: calls.append(1) or 0, clock)
    for number in range(40):
        clock.now += 0.25
        progress.update(step(number))
    assert len(calls) == 2


def test_a_terminal_gets_a_bar():
    out, clock = console(force_terminal=True), Clock()
    with ProgressBar(out, total=10, resumed=4, num_done=lambda: 2, clock=clock) as progress:
        clock.now += 1
        progress.update(step(1, prefill=10, decode=3))
    assert "6/10" in printed(out) and "max/mean load 1.25" in printed(out)
