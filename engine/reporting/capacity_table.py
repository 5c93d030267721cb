"""Capacity table: what expert capacity did to a run, for the terminal: a table and a sentence.

Without a policy there is no table, and a sentence only where a policy would be worthwhile.

Legend: gamma, the capacity factor.
"""

from __future__ import annotations

from decimal import Decimal

from rich.console import Console
from rich.table import Table

from engine.config import CapacityConfig
from engine.profiling.report import LayerReport, PolicyReport, RunReport
from engine.reporting.policy_report import describe_promise
from engine.reporting.table import new_table

_MAX_LAYERS = 8  # of more layers than this only the worst are shown
_NUM_WORST = 6
_NOT_SLOWER = 0.99  # speed bounds below this are not due to rounding
_IMBALANCED = 1.3  # max over mean rows of the ranks from which a policy is worthwhile


def print_capacity(console: Console, run: RunReport, capacity: CapacityConfig) -> None:
    """Print what the policy dropped, added and gained, or what one would gain.

    capacity: of the run; with moe.policy, of the first layer that it limits.
    """
    if run.policy is not None:
        line = describe_promise(run.policy)
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if capacity.policy == "none":
        # Without copies both are equal: nothing is dropped.
        imbalance = run.max_over_mean_after if run.has_copies else run.max_over_mean
        if len(run.ranks) > 1 and imbalance > _IMBALANCED:
            console.print(_advice(imbalance, run.has_copies), highlight=False)
        return
    layers = [layer for layer in run.layers if layer.assignments]
    if layers:
        console.print(_table(layers, run))
    console.print(describe(run, capacity), highlight=False)


def describe(run: RunReport, capacity: CapacityConfig) -> str:
    """Return one sentence: what was dropped and added, and how much faster the layers can be."""
    scope = f"{capacity.scope} scope, {capacity.consensus} consensus"
    name = f"{capacity.policy} at gamma {capacity.factor} ({scope})"
    if run.policy is not None:
        name = f"{capacity.policy} by moe.policy ({_layers_and_gammas(run.policy)})"
    routed = sum(layer.assignments for layer in run.layers)
    if not routed:
        phases = " and ".join(capacity.phases)
        return f"{name} had no effect: no token of phase {phases} was subject to capacity."
    dropped = sum(layer.dropped for layer in run.layers)
    added = sum(layer.added for layer in run.layers)
    text = f"{name} dropped {dropped / routed:.1%} of the {routed:,} eligible assignments"
    if capacity.policy == "expanded_drop":
        text += f" and added {added:,} on idle local experts"
    # Dropping lowers the mean too: max over mean can rise while every rank processes fewer rows.
    change = 1 / run.speed_bound - 1
    over = "over the run, with copies," if run.has_copies else "over the run"
    text += (
        f"; {over} the most loaded rank processed {abs(change):.1%} "
        f"{'more' if change > 0 else 'fewer'} rows (max/mean {run.max_over_mean:.2f} -> "
        f"{run.max_over_mean_after:.2f}): "
    )
    if run.speed_bound >= _NOT_SLOWER:
        text += f"MoE layers at most {run.speed_bound:.2f}x faster."
    else:
        text += (
            f"MoE layers {1 / run.speed_bound:.2f}x SLOWER, because extras fill experts up to "
            "their capacity; set moe.capacity.extras=dropped, or a moe.capacity.factor nearer to 1."
        )
    if run.ranked_by == "combine weights" and capacity.order == "score":
        text += " Assignments were ranked by combine weight: the router gives no other scores."
    return text


def _layers_and_gammas(policy: PolicyReport) -> str:
    """Return how many layers a policy limits, and how far."""
    factors = sorted({Decimal(str(each["factor"])) for each in policy.layers.values()})
    gammas = f"gamma {factors[0]}" + (f" to {factors[-1]}" if len(factors) > 1 else "")
    count = len(policy.layers)
    return f"{count} {'layer' if count == 1 else 'layers'} at {gammas}"


def _advice(imbalance: float, has_copies: bool) -> str:
    copies = "More copies, planned for these loads," if has_copies else "Copies of hot experts"
    return (
        f"The most loaded rank had {imbalance:.2f}x the mean rows and the others waited for it: "
        f"perfect balance would make the MoE layers at most {imbalance:.2f}x faster. {copies} "
        "balance the ranks, in the model's precision with the same outputs: record with --set "
        "profiler.routing=DIR, then run tools/plan_placement.py. Or limit every rank to the mean: "
        "--set moe.capacity.policy=token_drop --set moe.capacity.scope=rank --set "
        "moe.capacity.factor=1, and compare the outputs."
    )


def _table(layers: list[LayerReport], run: RunReport) -> Table:
    shown = layers
    if len(layers) > _MAX_LAYERS:
        worst = sorted(layers, key=lambda layer: -layer.drop_rate)[:_NUM_WORST]
        shown = sorted(worst, key=lambda layer: layer.layer)
    columns = ("ranks: max/mean", "experts: max/mean", "dropped", "added", "orphans", "gate mass")
    table = new_table("Capacity", *columns)
    for layer in shown:
        table.add_row(
            f"layer {layer.layer}",
            f"{layer.rank_max_over_mean:.2f} -> {layer.rank_max_over_mean_after:.2f}",
            f"{layer.expert_max_over_mean:.2f} -> {layer.expert_max_over_mean_after:.2f}",
            f"{layer.drop_rate:.1%}",
            f"{layer.added:,}",
            f"{layer.orphans:,}",
            f"{layer.gate_mass_kept:.3f}",
        )
    totals = run.totals
    table.add_section()
    table.add_row(
        f"all {len(run.layers)}",
        f"{run.max_over_mean:.2f} -> {run.max_over_mean_after:.2f}",
        "",
        f"{totals.drop_rate:.1%}",
        f"{totals.added:,}",
        f"{totals.orphans:,}",
        f"{totals.gate_mass_kept:.3f}",
    )
    if len(shown) < len(layers):
        table.caption = f"the {len(shown)} of {len(layers)} layers that dropped most"
    return table
