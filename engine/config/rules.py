"""Rules that settings of several sections share."""

from __future__ import annotations

import os

from engine.config.validation import Rule, rule

_MOST = 2**31 - 1  # of what is counted or indexed in 32 bits


def at_least(low: int, high: int | None = None) -> dict[str, Rule]:
    """Return the rule of a number with bounds."""
    text = f"at least {low}" + ("" if high is None else f" and at most {high}")
    return rule(text, lambda value: value >= low and (high is None or value <= high))


def _is_path(value: str) -> bool:
    try:
        return value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _positive(high: int) -> dict[str, Rule]:
    return rule(f"finite and above 0, at most {high}", lambda value: 0 < value <= high)


COUNT = at_least(1, _MOST)
COUNT_OR_0 = at_least(0, _MOST)
GIB, MIB = _positive(2**20), _positive(2**30)
SEED = rule("from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
TEXT = rule("non-empty text", lambda value: value != "")
PATH = rule("non-empty text that can be a path", _is_path)
