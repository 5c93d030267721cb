"""Copies table: how near copies of experts brought the ranks to perfect balance, for the terminal.

Without copies nothing is printed.
"""

from __future__ import annotations

from rich.console import Console

from engine.profiling.report import RunReport
from engine.reporting.table import new_table

_MAX_LAYERS = 8  # of more layers than this only the worst are shown
_NUM_WORST = 6


def print_copies(console: Console, run: RunReport) -> None:
    """Print the share of perfect balance of every layer with copies, and what they computed."""
    placement = run.placement
    if placement is None or not placement.copies:
        return
    layers = [(each, each.placement) for each in run.layers if each.placement is not None]
    shown = layers
    if len(layers) > _MAX_LAYERS:
        worst = sorted(layers, key=lambda each: each[1].share_after)[:_NUM_WORST]
        shown = sorted(worst, key=lambda each: each[0].layer)
    table = new_table("Copies", "share of\nperfect balance", "rows by\ncopies", "of all\nrows")
    for layer, copies in shown:
        rows = sum(layer.expert_loads_after)
        table.add_row(
            f"layer {layer.layer}",
            f"{copies.share:.3f} -> {copies.share_after:.3f}",
            f"{copies.copied_rows:,}",
            _percent(copies.copied_rows, rows),
        )
    rows = sum(sum(layer.expert_loads_after) for layer in run.layers)
    table.add_section()
    table.add_row(
        f"all {len(run.layers)}",
        f"{placement.share:.3f} -> {placement.share_after:.3f}",
        f"{placement.copied_rows:,}",
        _percent(placement.copied_rows, rows),
    )
    sizes = [rank.placement.copy_bytes for rank in run.ranks if rank.placement is not None]
    most, least = mib(max(sizes, default=0)), mib(min(sizes, default=0))
    kind = "the model's precision" if placement.precision == "model" else placement.precision
    table.caption = (
        f"{placement.copies:,} {'copy' if placement.copies == 1 else 'copies'} in {kind} "
        f"({most if most == least else f'{least} to {most}'} MiB per rank); share: rows of the "
        "mean rank over the most loaded one, without -> with"
    )
    if len(shown) < len(layers):
        table.caption += f"; the {len(shown)} of {len(layers)} layers that are furthest from it"
    console.print(table)


def mib(num_bytes: int) -> str:
    """Format a size in MiB."""
    return f"{num_bytes / 2**20:,.1f}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole if whole else 0.0:.1%}"
