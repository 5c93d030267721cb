"""JSON of records: orjson's, and the standard library's for the few values that orjson refuses."""

from __future__ import annotations

import json
import math
from typing import Any

import orjson

from engine.request import Completion


def to_json(value: Any) -> bytes:
    """Return a value as one line of JSON.

    Numbers that are not finite become null: JSON has none. Half of a surrogate pair, which no UTF-8
    can hold, is written as an escape; a whole number may have any length.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:  # one of the two above, anywhere in the value
        return json.dumps(_finite(value), separators=(",", ":"), default=_plain).encode()


def own_record(completion: Completion) -> bytes:
    """Return a completion's record in our own form."""
    return to_json(completion.record())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """Return a number or an array of numpy as Python's."""
    return _finite(value.tolist())
