"""Strict JSON, for lines that users wrote: no duplicate keys, no NaN or Infinity."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from engine.request import show


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return one JSON object. Raises ValueError with what is wrong and where."""
    try:
        value = json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON: {error.msg} at character {error.pos}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"is not valid UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("is not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{show(value)}: must be a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
