"""The heat map: every rank's share of the rows by layer, before a plan and after it.

A cell is the mean over steps of a rank's time over the mean rank's: 1.0 is balanced. As a PNG by
matplotlib, or as a page that loads nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_MOST = 2.0  # where the colours end


def check_available(path: Path) -> None:
    """Refuse a picture that could not be drawn.

    Raises:
        ValueError: the name ends in neither .png nor .html, or matplotlib is not installed.
    """
    if path.suffix not in (".png", ".html"):
        raise ValueError(f"--heat-map {path}: the name must end in .png or .html")
    if path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"--heat-map {path}: a PNG needs matplotlib; install the extra `dev`, or name a .html"
        )


def draw(before_LW: np.ndarray, after_LW: np.ndarray, layers: Sequence[int], path: Path) -> None:
    """Write the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        _draw_png(before_LW, after_LW, layers, path)
    else:
        path.write_text(_page(before_LW, after_LW, layers), encoding="utf-8")


def _draw_png(
    before_LW: np.ndarray, after_LW: np.ndarray, layers: Sequence[int], path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    height = min(12.0, 1.6 + 0.22 * len(layers))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, height), sharey=True, layout="constrained")
    image = None
    for axis, values_LW, title in zip(
        axes, (before_LW, after_LW), ("today", "planned"), strict=True
    ):
        image = axis.imshow(
            values_LW, aspect="auto", cmap="coolwarm", vmin=0, vmax=_MOST, interpolation="nearest"
        )
        axis.set_title(f"{title}: most {values_LW.max():.2f}")
        axis.set_xlabel("rank")
    every = -(-len(layers) // 20)
    axes[0].set_yticks(range(0, len(layers), every), [str(each) for each in layers[::every]])
    axes[0].set_ylabel("layer")
    assert image is not None
    figure.colorbar(image, ax=axes, label="rows over the mean rank's")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _page(before_LW: np.ndarray, after_LW: np.ndarray, layers: Sequence[int]) -> str:
    tables = [
        f"<h2>{title}: most {values_LW.max():.2f}</h2>\n{_table(values_LW, layers)}"
        for title, values_LW in (("today", before_LW), ("planned", after_LW))
    ]
    style = "body{font:13px sans-serif}td,th{padding:2px 6px;text-align:right}"
    return (
        '<!doctype html><meta charset="utf-8"><title>Placement: rows by layer and rank</title>\n'
        f"<style>{style}</style>\n<h1>Rows of each rank over the mean rank's</h1>\n"
        + "\n".join(tables)
        + "\n"
    )


def _table(values_LW: np.ndarray, layers: Sequence[int]) -> str:
    head = "".join(f"<th>rank {rank}</th>" for rank in range(values_LW.shape[1]))
    rows = [
        f"<tr><th>layer {layer}</th>" + "".join(_cell(value) for value in values_W) + "</tr>"
        for layer, values_W in zip(layers, values_LW.tolist(), strict=True)
    ]
    return f"<table><tr><th></th>{head}</tr>\n" + "\n".join(rows) + "</table>"


def _cell(value: float) -> str:
    off = max(-1.0, min(1.0, value - 1))
    hue, light = (0, 100 - 45 * off) if off > 0 else (220, 100 + 45 * off)
    return f'<td style="background:hsl({hue} 80% {light:.0f}%)">{value:.2f}</td>'
