"""Report: predictions as one table, one JSON object and one plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.reporting.table import new_table
from engine.simulate.cost_model import CostModel
from engine.simulate.loads import Traffic
from engine.simulate.plot import write_plot
from engine.simulate.prediction import Prediction

_GIB = 1 << 30
_COLUMNS = (
    "scenario", "most rows", "share", "dropped", "layer ms", "step ms", "tokens/s", "waiting",
    "memory GiB", "consensus KiB", "loss",
)  # fmt: skip


def labels(predictions: Sequence[Prediction]) -> list[str]:
    """Return what tells the scenarios apart."""
    fields: list[list[str]] = []
    for found in predictions:
        each = found.scenario
        replicas = f" in {each.replicas} replicas" if each.replicas > 1 else ""
        copies = "placement" if each.copies < 0 else f"{each.copies} copies"
        fields.append(
            [
                f"{each.ranks:,} ranks{replicas}",
                "dropless" if each.gamma == "none" else f"gamma {each.gamma}",
                copies if each.copies else "",
                f"{found.tokens:,.0f} tokens",
                f"{each.ranks_per_node} per node",
            ]
        )
    varies = [len({line[column] for line in fields}) > 1 for column in range(5)]
    always = (0, 1, 2)
    return [
        ", ".join(
            text
            for column, text in enumerate(line)
            if text and (column in always or varies[column])
        )
        for line in fields
    ]


def print_table(
    predictions: Sequence[Prediction], traffic: Traffic, costs: CostModel | None
) -> None:
    """Print the table, what the costs are, and what in it is not exact."""
    table = new_table(*_COLUMNS)
    for label, found in zip(labels(predictions), predictions, strict=True):
        line = as_json(found, label)
        memory, step = line["memory_gib"], line["step_ms"]
        table.add_row(
            label,
            ("" if found.is_exact else "~") + f"{line['most_rows']:,.1f}",
            f"{line['share']:.3f}",
            f"{line['drop_rate']:.2%}",
            _number(line["layer_ms"]),
            _number(step),
            _number(line["tokens_per_s"]),
            "-" if found.waiting is None else f"{found.waiting:.1%}",
            _number(memory),
            _number(line["consensus_kib"]),
            "-",
        )
    console = Console(width=150, highlight=False)
    made = f"{len(traffic.loads_SLE)} steps of {traffic.name}, {len(traffic.layers)} MoE layers"
    console.print(f"{made}, {traffic.num_experts} experts, top-{traffic.top_k}", markup=False)
    console.print(table)
    console.print(origin(costs), markup=False)
    if not all(found.is_exact for found in predictions):
        console.print(
            "~: not exact; loads do not say which claims come first, compete, or are a rank's.",
            markup=False,
        )


def origin(costs: CostModel | None) -> str:
    """Return a sentence on where times come from."""
    if costs is None:
        return "No times: give --device or --fit, and --model or --hidden and --ffn."
    if costs.measured:
        return f"Times from costs fitted to {costs.measured}."
    return (
        f"Times from ASSUMED figures of {costs.name}: nothing was measured; see its file in "
        "configs/devices."
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def as_json(found: Prediction, label: str) -> dict[str, Any]:
    """Return a prediction as plain data."""
    each, layer, step = found.scenario, found.layer_seconds, found.step_seconds
    return {
        "scenario": label,
        "ranks": each.ranks,
        "expert_ranks": each.expert_ranks,
        "gamma": each.gamma,
        "scope": each.capacity.scope,
        "copies": None if each.copies < 0 else each.copies,
        "ranks_per_node": each.ranks_per_node,
        "tokens": found.tokens,
        "exact": found.is_exact,
        "most_rows": sum(part.most_rows for part in found.layers) / len(found.layers),
        "share": found.share,
        "drop_rate": found.drop_rate,
        "layer_ms": None if layer is None else layer * 1e3,
        "step_ms": None if step is None else step * 1e3,
        "tokens_per_s": found.tokens / step if step else None,
        "waiting": found.waiting,
        "memory_gib": None if found.memory_bytes is None else found.memory_bytes / _GIB,
        "consensus_kib": found.consensus_bytes / 1024 or None,
        "loss": None,
        "layers": [
            {
                "layer": part.layer,
                "most_rows": part.most_rows,
                "mean_rows": part.mean_rows,
                "drop_rate": part.dropped / part.routed if part.routed else 0.0,
                "ms": {name: value * 1e3 for name, value in part.parts.items()},
            }
            for part in found.layers
        ],
    }


def plot(path: Path, predictions: Sequence[Prediction], costs: CostModel | None) -> None:
    """Draw the mean layer of every scenario by part; without costs, the most loaded rank's rows.

    Raises:
        ValueError: the file cannot be written.
    """
    bars: list[tuple[str, dict[str, float]]] = []
    for label, found in zip(labels(predictions), predictions, strict=True):
        parts: dict[str, float] = {}
        for layer in found.layers:
            own = {"experts": layer.most_rows} if costs is None else layer.parts
            for name, value in own.items():
                scale = 1.0 if costs is None else 1e3
                parts[name] = parts.get(name, 0.0) + value * scale / len(found.layers)
        bars.append((label, parts))
    if costs is None:
        write_plot(path, "Rows of the most loaded rank, mean layer", bars, "rows")
        return
    made = "fitted" if costs.measured else f"ASSUMED figures of {costs.name}"
    write_plot(path, f"Predicted time of a mean MoE layer ({made})", bars, "ms")
