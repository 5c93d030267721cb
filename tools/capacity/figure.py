"""The report's figure: quality against speed, a column of panels for each number of ranks.

Upper row: task accuracy; lower row: loss, better upwards. The line joins the settings on the Pareto
front, which are labelled with their gamma.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capacity.panel import Panel, Result
from capacity.tables import panel_fronts

_COLOURS = {
    "dropless": "black",
    "token_drop expert": "tab:blue",
    "token_drop rank": "tab:green",
    "expanded_drop expert": "tab:orange",
    "expanded_drop rank": "tab:red",
}
_MARKERS = {"score": "o", "random": "X", "first": "<", "last": ">"}


def check_available() -> None:
    """Refuse a long run whose figure could not be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "--out: the figure needs matplotlib; install the extra `dev`, or omit --out for "
            "the tables alone"
        )


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the PNG of one model's panels."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(panels), figsize=(4.6 * len(panels) + 1.4, 7.6), squeeze=False, sharey="row"
    )
    for column, panel in enumerate(panels):
        fronts = panel_fronts(panel)
        _scatter(axes[0][column], panel, [100 * r.scores.accuracy for r in panel.results])
        _join(axes[0][column], panel, fronts["tasks"], lambda r: 100 * r.scores.accuracy)
        _scatter(axes[1][column], panel, [r.scores.loss for r in panel.results])
        _join(axes[1][column], panel, fronts["loss"], lambda r: r.scores.loss)
        axes[0][column].set_title(f"{panel.ranks} ranks")
        axes[1][column].set_xlabel("speed bound S of the MoE layers")
    axes[0][0].set_ylabel("tasks, % exactly right")
    axes[1][0].set_ylabel("validation loss, nats per token")
    axes[1][0].invert_yaxis()  # shared by the row: better is up everywhere
    figure.suptitle(f"{panels[0].model}: quality against speed, line: Pareto front")
    handles = [
        pyplot.Line2D([], [], marker="o", linestyle="", color=colour, label=name)
        for name, colour in _COLOURS.items()
    ]
    handles += [
        pyplot.Line2D([], [], marker=marker, linestyle="", color="grey", label=f"order {name}")
        for name, marker in _MARKERS.items()
        if name != "score"
    ]
    handles.append(
        pyplot.Line2D(
            [], [], marker="o", linestyle="", color="grey", fillstyle="none", label="other factors"
        )
    )
    columns = min(5, 1 + 2 * len(panels))
    lines = -(-len(handles) // columns)
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False)
    figure.tight_layout(rect=(0, 0.01 + 0.033 * lines, 1, 0.98))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _scatter(axis: Any, panel: Panel, values: Sequence[float]) -> None:
    for result, value in zip(panel.results, values, strict=True):
        setting = result.setting
        none = setting.policy == "none"
        kind = "dropless" if none else f"{setting.policy} {setting.scope}"
        plain = (setting.consensus, setting.tiers, setting.extras) == ("global", "two", "all")
        colour = _COLOURS[kind]
        axis.scatter(
            result.speed.bound,
            value,
            marker=_MARKERS[setting.order],
            s=64 if setting.policy == "token_drop" else 22,  # both visible where they coincide
            edgecolors=colour,
            facecolors=colour if plain and not setting.renormalize else "none",
        )
    axis.grid(alpha=0.3)


def _join(axis: Any, panel: Panel, indices: Sequence[int], value: Any) -> None:
    chosen: list[Result] = [panel.results[index] for index in indices]
    bounds = [result.speed.bound for result in chosen]
    axis.plot(bounds, [value(result) for result in chosen], color="grey", linewidth=1, zorder=0)
    for result in chosen:
        if result.setting.policy != "none":
            axis.annotate(
                str(result.setting.factor),
                (result.speed.bound, value(result)),
                textcoords="offset points",
                xytext=(4, 4),
                fontsize=7,
            )
