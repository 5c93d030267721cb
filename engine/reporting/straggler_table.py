"""What a run tells its user about stragglers: who was late, why, and what it cost.

Printed by `progress.py` after the ranks' times. The numbers come from `profiling/straggler.py`, the
sentences from `profiling/verdict.py`.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from engine.profiling.report import RankReport, RunReport

_MOST_RANKS = 8
_HEADINGS = {
    "load": "expert\nload",
    "tokens": "own\ntokens",
    "device": "slow\ndevice",
    "host": "host",
}


def print_stragglers(console: Console, run: RunReport) -> None:
    """Print who the others waited for and the verdict; nothing where nothing was timed."""
    if any(rank.late_share for rank in run.ranks):
        console.print(_table(run))
    for verdict in run.verdict:
        console.print(f"Straggler: {verdict.text}.", highlight=False)


def _table(run: RunReport) -> Table:
    """The ranks that cost most, at most eight of them."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption_justify="left")
    table.add_column("Late rank", vertical="bottom")
    columns = ("most late\nin steps", "slower at\nequal load", *_HEADINGS.values())
    for column in columns:
        table.add_column(column, justify="right", vertical="bottom")
    worst = sorted(run.ranks, key=lambda rank: -sum(rank.lost.values()))[:_MOST_RANKS]
    for rank in sorted(worst, key=lambda rank: rank.rank):
        table.add_row(str(rank.rank), *_cells(rank))
    hidden = len(run.ranks) - len(worst)
    more = f"; {hidden} ranks cost less" if hidden else ""
    error = f"; clocks agree within {run.clock_error * 1e6:.0f} us" if run.clock_error else ""
    table.caption = f"seconds that the others waited for it, by cause{more}{error}"
    return table


def _cells(rank: RankReport) -> list[str]:
    return [
        f"{rank.late_share:.0%}",
        f"{rank.slowness - 1:+.0%}",
        *(f"{rank.lost.get(cause, 0.0):.2f}" for cause in _HEADINGS),
    ]
