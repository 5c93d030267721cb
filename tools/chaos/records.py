"""Compares the records of a disturbed job with those of an undisturbed one. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Fixed by greedy decoding; timings and capacity differ between runs.
FIELDS = ("text", "token_ids", "finish_reason", "usage", "error")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ids of wrong records, and whether the order is right."""

    lost: tuple[str, ...]  # missing
    doubled: tuple[str, ...]  # present more than once
    differing: tuple[str, ...]  # with other contents
    strange: tuple[str, ...]  # of no request
    in_order: bool

    @property
    def same(self) -> bool:
        """Whether nothing is wrong."""
        problems = (self.lost, self.doubled, self.differing, self.strange)
        return self.in_order and not any(problems)


def compare(lines: Sequence[str], undisturbed: Sequence[str]) -> Comparison:
    """Compare two outputs, line by line JSON; the undisturbed one has every id once, in order."""
    expected = {record["id"]: _result(record) for record in map(json.loads, undisturbed)}
    ids, differing, strange = [], [], []
    for line in lines:
        try:
            record = json.loads(line)
            name = record["id"]
        except (ValueError, KeyError, TypeError):
            strange.append(line[:40])
            continue
        if name not in expected:
            strange.append(str(name))
            continue
        ids.append(name)
        if _result(record) != expected[name]:
            differing.append(str(name))
    counts = Counter(ids)
    return Comparison(
        lost=tuple(name for name in expected if name not in counts),
        doubled=tuple(name for name, count in counts.items() if count > 1),
        differing=tuple(differing),
        strange=tuple(strange),
        in_order=list(dict.fromkeys(ids)) == [name for name in expected if name in counts],
    )


def _result(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record.get(name) for name in FIELDS}
