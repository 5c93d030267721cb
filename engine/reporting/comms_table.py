"""Communication table: DeepSpeed's figures of rank 0, for the terminal.

They come from `profiling/deepspeed_comms.py`; those of all ranks are in the report's JSON. Without
`profiler.deepspeed_comms` nothing is printed.
"""

from __future__ import annotations

from rich.console import Console

from engine.profiling.report import RunReport
from engine.reporting.table import new_table

_COLUMNS = (
    "DeepSpeed comms",
    "messages\nup to",
    "count",
    "total\nlatency ms",
    "average\nlatency ms",
    "throughput\nGbit/s",
    "bus\nGbit/s",
)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_comms(console: Console, run: RunReport) -> None:
    """Print the first rank's table, if there is one."""
    rank = run.ranks[0]
    if not rank.comms:
        return
    table = new_table(*_COLUMNS)
    for operation, rows in rank.comms.items():
        for index, row in enumerate(rows):
            table.add_row(
                operation if index == 0 else "",
                _size(row.message_bytes),
                f"{row.count:,}",
                f"{row.total_latency_ms:,.1f}",
                f"{row.avg_latency_ms:.3f}",
                f"{row.tput_avg_gbps:.2f}",
                f"{row.busbw_avg_gbps:.2f}",
            )
    table.caption = f"rank {rank.rank}; waiting for stragglers and overlapped work included"
    console.print(table)


def _size(num_bytes: int) -> str:
    """Format a power of two bytes in its unit; 0 B is the line of empty messages."""
    power = max(0, num_bytes.bit_length() - 1)
    unit = min(power // 10, len(_UNITS) - 1)
    return f"{num_bytes >> 10 * unit} {_UNITS[unit]}"
