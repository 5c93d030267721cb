"""One check: the measured value, its bound, and whether it passed; or a figure without a bound."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A row of the suite's table."""

    group: str
    name: str
    passed: bool | None  # None: it cannot run here, for the reason in `note`
    value: float | None = None
    bound: float | None = None
    note: str = ""
    is_figure: bool = False  # measured, and not judged

    @property
    def result(self) -> str:
        """The word in the table."""
        if self.is_figure:
            return "figure"
        return {True: "ok", False: "FAILED", None: "not here"}[self.passed]

    def plain(self) -> dict[str, Any]:
        """Return the fields for JSON, which has no infinity and no NaN: such values are None."""
        fields = asdict(self)
        for name in ("value", "bound"):
            if fields[name] is not None and not math.isfinite(fields[name]):
                fields[name] = None
        return fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How the parts run."""

    device: torch.device
    families: tuple[str, ...]
    is_tiny: bool  # small shapes and few rounds: tries the suite itself


def at_most(group: str, name: str, value: float, bound: float, note: str = "") -> Check:
    """Return the check of a value that must not exceed its bound; NaN fails."""
    return Check(group=group, name=name, passed=value <= bound, value=value, bound=bound, note=note)


def figure(group: str, name: str, value: float, note: str = "", of: float | None = None) -> Check:
    """Return a measured value; `of`: what it is to be read against, which it need not reach."""
    return Check(
        group=group, name=name, passed=True, value=value, bound=of, note=note, is_figure=True
    )


def not_here(group: str, name: str, why: str) -> Check:
    """Return a check that cannot run on this machine."""
    return Check(group=group, name=name, passed=None, note=why)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ||result - expected|| / ||expected|| in float64; inf for a wrong shape or NaN."""
    result, expected = result.detach().cpu().double(), expected.detach().cpu().double()
    if result.shape != expected.shape or not bool(result.isfinite().all()):
        return float("inf")
    scale = float(expected.norm())
    difference = float((result - expected).norm())
    return difference / scale if scale else difference


def guarded(group: str, name: str, make: Callable[[], list[Check]]) -> list[Check]:
    """Return the checks of `make`; an exception becomes one failed check."""
    try:
        return make()
    except Exception as error:  # the suite reports what fails on an unknown machine
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        return [
            Check(
                group=group,
                name=name,
                passed=False,
                note=f"{type(error).__name__}: {lines[-1]}"[:160],
            )
        ]
