"""Straggler table: which ranks the others waited for, why, and for how long, for the terminal.

The numbers come from `profiling/straggler_causes.py`, the sentences from `profiling/findings.py`.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from engine.profiling.report import RankReport, RunReport
from engine.reporting.table import new_table

_MAX_RANKS = 8
_HEADINGS = {
    "load": "expert\nload",
    "tokens": "own\ntokens",
    "device": "slow\ndevice",
    "host": "host",
}


def print_stragglers(console: Console, run: RunReport) -> None:
    """Print the table and the findings; nothing where nothing was timed."""
    if any(rank.straggler_share for rank in run.ranks):
        console.print(_table(run))
    for finding in run.findings:
        console.print(f"Straggler: {finding.text}.", highlight=False)


def _table(run: RunReport) -> Table:
    """Build the table of the ranks that caused the longest waits, at most eight of them."""
    columns = ("straggler\nin steps", "slower at\nequal load", *_HEADINGS.values())
    table = new_table("Waited-for rank", *columns)
    worst = sorted(run.ranks, key=lambda rank: -sum(rank.wait_caused.values()))[:_MAX_RANKS]
    for rank in sorted(worst, key=lambda rank: rank.rank):
        table.add_row(str(rank.rank), *_cells(rank))
    hidden = len(run.ranks) - len(worst)
    more = f"; {hidden} ranks caused less" if hidden else ""
    error = f"; clocks agree within {run.clock_error * 1e6:.0f} us" if run.clock_error else ""
    table.caption = f"seconds that a mean rank waited for it, by cause{more}{error}"
    return table


def _cells(rank: RankReport) -> list[str]:
    return [
        f"{rank.straggler_share:.0%}",
        f"{rank.relative_compute_time - 1:+.0%}",
        *(f"{rank.wait_caused.get(cause, 0.0):.2f}" for cause in _HEADINGS),
    ]
