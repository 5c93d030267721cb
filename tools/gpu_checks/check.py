"""One check: the measured value, its bound, and whether it passed."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

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


def at_most(group: str, name: str, value: float, bound: float, note: str = "") -> Check:
    """Return the check of a value that must not exceed its bound; NaN fails."""
    return Check(group=group, name=name, passed=value <= bound, value=value, bound=bound, note=note)


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
