"""Table: the one layout of the tables that a finished job prints."""

from __future__ import annotations

from rich import box
from rich.table import Table


def new_table(*columns: str) -> Table:
    """Return an empty table with these headings; the first column and `host` hold text."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption_justify="left")
    for index, column in enumerate(columns):
        is_text = index == 0 or column == "host"
        table.add_column(column, justify="left" if is_text else "right", vertical="bottom")
    return table
