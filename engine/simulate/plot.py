"""Plot: layer time by part for every scenario, as an SVG that needs no library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

_COLOURS = {
    "local": "#4c78a8", "consensus": "#b279a2", "dispatch": "#f58518", "experts": "#54a24b",
    "combine": "#eeca3b", "host": "#bab0ac",
}  # fmt: skip
_LEFT, _BAR, _GAP, _WIDE = 300, 16, 8, 560


def write_plot(
    path: Path, title: str, bars: Sequence[tuple[str, dict[str, float]]], unit: str
) -> None:
    """Draw one bar per scenario.

    Args:
        path: ends in .svg.
        title: of the plot.
        bars: label, and the lengths of its parts.
        unit: of the lengths.

    Raises:
        ValueError: the file cannot be written.
    """
    most = max((sum(parts.values()) for _, parts in bars), default=0.0) or 1.0
    height = 84 + len(bars) * (_BAR + _GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDE + 90}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
    ]
    used = [name for name in _COLOURS if any(name in parts for _, parts in bars)]
    for place, name in enumerate(used):
        x = _LEFT + place * 92
        lines.append(f'<rect x="{x}" y="32" width="10" height="10" fill="{_COLOURS[name]}"/>')
        lines.append(f'<text x="{x + 14}" y="41">{name}</text>')
    for place, (label, parts) in enumerate(bars):
        x, y = float(_LEFT), 58 + place * (_BAR + _GAP)
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
        for name in used:
            width = _WIDE * parts.get(name, 0.0) / most
            fill = _COLOURS[name]
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{fill}"/>'
            )
            x += width
        total = f"{sum(parts.values()):.4g} {unit}"
        lines.append(f'<text x="{x + 6:.1f}" y="{y + 12}">{total}</text>')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--plot {path}: cannot be written: {error.strerror}") from error
