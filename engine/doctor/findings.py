"""Findings: the rows of the doctor's table, of one rank and of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_MARKS = {True: "ok", False: "FAILS", None: "-"}


class Absent(Exception):
    """What is not there, which is no fault unless it is needed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table, as one rank sees it."""

    part: str  # installed, works or chosen
    name: str
    text: str
    works: bool | None  # None: not there
    is_needed: bool = False  # by the engine here, or by the config


def table_lines(ranks: Sequence[Sequence[Finding]]) -> list[str]:
    """Return the table: a line per finding, and where ranks differ one per answer.

    ranks: the findings of each rank.
    """
    rows: dict[tuple[str, str], dict[tuple[str, str], list[int]]] = {}
    for rank, found in enumerate(ranks):
        for each in found:
            answers = rows.setdefault((each.part, each.name), {})
            answers.setdefault((_MARKS[each.works], each.text), []).append(rank)
    wide = max(len(name) for _, name in rows)
    lines = []
    for (part, name), answers in rows.items():
        agree = [*answers.values()] == [[*range(len(ranks))]]
        for (mark, text), who in answers.items():
            of = "" if agree else f"rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}: "
            lines.append(f"{part:<9} {name:<{wide}} {mark:<5} {of}{text}".rstrip())
            part = name = ""
    return lines


def check_one(part: str, name: str, check: Callable[[], str], is_needed: bool = False) -> Finding:
    """Run one check; what it raises is its finding."""
    try:
        return Finding(part, name, check(), True, is_needed)
    except Absent as error:
        return Finding(part, name, str(error), None, is_needed)
    except Exception as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        text = "; ".join(lines[:3]).replace(":; ", ": ") or type(error).__name__
        return Finding(part, name, text, False, is_needed)
