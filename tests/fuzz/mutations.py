"""Random changes of JSON values and bytes, all drawn from one generator."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

ODD_NUMBERS = [0, -1, 1, 2, 3, 7, 255, 2**31, 2**63, 10**30, 0.5, -1.5, 1e308]
ODD_TEXTS = ["", "64", "x", "true", "null", "../x", "/etc/passwd", "\x00", "é", "\ud800", "x" * 999]
ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    *ODD_NUMBERS,
    float("nan"),
    float("inf"),
    *ODD_TEXTS,
    [],
    [1],
    [None],
    ["a", 1],
    {},
    {"a": 1},
    {"type": "x"},
    [[[[]]]],
]


def odd_value(chance: random.Random) -> Any:
    """Return a value that a field rarely has."""
    return copy.deepcopy(chance.choice(ODD_VALUES))


def mutated(value: Any, chance: random.Random, names: list[str]) -> Any:
    """Return a JSON value with one random change anywhere in it.

    Args:
        names: keys that may be added to an object.
    """
    value = copy.deepcopy(value)
    if not isinstance(value, dict | list) or not value:
        return odd_value(chance)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = chance.choice(keys)
    kind = chance.random()
    if kind < 0.35 and isinstance(value[key], dict | list) and value[key]:
        value[key] = mutated(value[key], chance, names)
    elif kind < 0.7:
        value[key] = odd_value(chance)
    elif kind < 0.8:
        del value[key]
    elif isinstance(value, list):
        value.insert(key, odd_value(chance))
    elif kind < 0.9:
        value[misspelt(str(key), chance)] = value.pop(key)
    else:
        value[chance.choice(names)] = odd_value(chance)
    return value


def misspelt(name: str, chance: random.Random) -> str:
    """Return a name with one character left out, doubled or changed, or in another case."""
    if not name:
        return "x"
    place = chance.randrange(len(name))
    before, at, after = name[:place], name[place], name[place + 1 :]
    return chance.choice(
        [before + after, before + at * 2 + after, f"{before}x{after}", name.upper()]
    )


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """Return bytes with one random damage: cut, changed, inserted, repeated."""
    if not raw:
        return b"\x00"
    place = chance.randrange(len(raw))
    noise = chance.randbytes(chance.choice([1, 1, 4, 300]))
    return chance.choice(
        [
            raw[:place],
            raw[:place] + noise + raw[place + len(noise) :],
            raw[:place] + noise + raw[place:],
            raw[:place] + raw[place : place + 50] * 2 + raw[place + 50 :],
            b"",
            chance.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b"]) + raw,
        ]
    )


def to_json(value: Any) -> bytes:
    """Return a value as JSON; NaN and halves of surrogate pairs as Python writes them."""
    return json.dumps(value, ensure_ascii=True).encode()
