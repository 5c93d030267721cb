"""Cases of an evaluation: one config per value of the swept setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import Config
from engine.config.loader import load_config

_OPENING, _CLOSING = "[{", "]}"


@dataclass(frozen=True, slots=True)
class Case:
    """One column of the table."""

    value: str | None  # of the swept setting; None: nothing is swept
    config: Config


def make_cases(name: str, overrides: Sequence[str], sweep: str | None) -> list[Case]:
    """Return the cases in their order; all errors in the settings are found here.

    Args:
        name: as in `--config`.
        overrides: `section.key=value`.
        sweep: `section.key=value,value,...`; None: one case.

    Raises:
        ValueError: a setting that is wrong, or a sweep that has no effect.
    """
    if sweep is None:
        return [Case(None, load_config(name, list(overrides)))]
    key, sign, text = sweep.partition("=")
    values = split_values(text)
    if not sign or not key or not all(values):
        raise ValueError(
            f"--sweep {sweep}: must be KEY=VALUE,VALUE,..., as in moe.capacity.factor=2,1"
        )
    cases = [Case(value, load_config(name, [*overrides, f"{key}={value}"])) for value in values]
    if len(set(values)) < len(values):
        raise ValueError(f"--sweep {sweep}: gives a value twice")
    policies = {case.config.moe.capacity.policy for case in cases}
    if key.startswith("moe.capacity.") and policies == {"none"}:
        raise ValueError(
            f"--sweep {sweep}: has no effect without a policy; add --set "
            "moe.capacity.policy=token_drop"
        )
    return cases


def split_values(text: str) -> list[str]:
    """Return the values between commas that are in no brackets: "1,[a,b]" are two."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if letter == "," and not depth:
            values.append("")
        else:
            values[-1] += letter
    return [value.strip() for value in values]
