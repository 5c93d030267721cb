"""Builds the page: template, style and script from the files in this folder, and the data.

The page is one file and loads nothing. All text from the run is in a JSON block and is set as text
by the script, never as markup.
"""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
_SCRIPTS = ("util.js", "gantt.js", "strip.js", "bars.js", "expert_loads.js", "main.js")
# Characters that would end a script element, or a line of JavaScript.
_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}


def page(data: dict[str, Any]) -> str:
    """Return the page of `data.page_data`."""
    parts = {
        "title": html.escape(f"Lockstep stragglers: {data['run']}"),
        "style": _text("page.css"),
        "script": "\n".join(_text(name) for name in _SCRIPTS),
        "data": embedded(data),
    }
    text = _text("page.html")
    for name, part in parts.items():
        # The data goes in last, so nothing in it is taken for a placeholder.
        text = text.replace("{{" + name + "}}", part, 1)
    return text


def embedded(data: Any) -> str:
    """Return JSON that is safe inside a script element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
