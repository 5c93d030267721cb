"""One checked fact: what was measured, which bound it had to keep, and whether it did."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A row of the suite's table. `passed` is None for what cannot run here; `note` says why."""

    group: str
    name: str
    passed: bool | None
    value: float | None = None
    bound: float | None = None
    note: str = ""


def at_most(group: str, name: str, value: float, bound: float, note: str = "") -> Check:
    """A value that must not exceed its bound; NaN fails."""
    return Check(group=group, name=name, passed=value <= bound, value=value, bound=bound, note=note)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """||result - expected|| / ||expected|| in float64; inf for the wrong shape, inf or NaN."""
    result, expected = result.detach().cpu().double(), expected.detach().cpu().double()
    if result.shape != expected.shape or not bool(result.isfinite().all()):
        return float("inf")
    scale = float(expected.norm())
    difference = float((result - expected).norm())
    return difference / scale if scale else difference


def guarded(group: str, name: str, make: Callable[[], list[Check]]) -> list[Check]:
    """The checks of `make`; whatever it raises becomes one failed check."""
    try:
        return make()
    except Exception as error:  # the suite says what fails on a machine nobody has seen before
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
