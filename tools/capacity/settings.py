"""Capacity settings of a report: pure lists of `CapacityConfig`, dropless first.

The default is policy by scope by gamma, the front one chooses from, and around Token Drop and
Expanded Drop one factor varied at a time: order, consensus, tiers, extras, renormalize. `--full` is
the product of all factors, `--domains` that of the factors that matter when ranks see different
traffic.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from engine.config import CapacityConfig, RequestPhase

ORDERS = ("score", "random", "first", "last")
CONSENSUS = ("global", "quota", "local")
POLICIES = ("token_drop", "expanded_drop")
# A label omits factors with their default value.
_DEFAULT = CapacityConfig()


def default_grid(
    gammas: Sequence[str],
    factor_gammas: Sequence[str],
    *,
    scopes: Sequence[str] = ("expert", "rank"),
    phases: Sequence[RequestPhase] = ("prefill",),
) -> list[CapacityConfig]:
    """Return the front at `gammas`, and one factor varied at a time at each of `factor_gammas`."""
    found = [
        _setting(phases, policy=policy, scope=scope, factor=gamma)
        for policy, scope, gamma in itertools.product(POLICIES, scopes, gammas)
    ]
    for gamma in factor_gammas:
        drop = _setting(phases, policy="token_drop", factor=gamma)
        expanded = replace(drop, policy="expanded_drop")
        found += [replace(drop, order=order) for order in ORDERS]
        found += [replace(drop, consensus=name) for name in CONSENSUS]
        found += [expanded, replace(expanded, tiers="one"), replace(expanded, extras="dropped")]
        found += [drop, replace(drop, renormalize=True)]
    return _distinct(phases, found)


def domain_grid(
    gammas: Sequence[str],
    *,
    scopes: Sequence[str] = ("expert", "rank"),
    phases: Sequence[RequestPhase] = ("prefill",),
) -> list[CapacityConfig]:
    """Return every consensus at every gamma: Token Drop in each scope, Expanded Drop by expert."""
    combinations = [("token_drop", scope) for scope in scopes] + [("expanded_drop", "expert")]
    found = [
        _setting(phases, policy=policy, scope=scope, factor=gamma, consensus=name)
        for (policy, scope), gamma, name in itertools.product(combinations, gammas, CONSENSUS)
    ]
    return _distinct(phases, found)


def full_grid(
    gammas: Sequence[str],
    *,
    scopes: Sequence[str] = ("expert", "rank"),
    phases: Sequence[RequestPhase] = ("prefill",),
) -> list[CapacityConfig]:
    """Return the product of policy, order, gamma, consensus and scope, with each kind of extras."""
    found = []
    for scope, name, order, gamma in itertools.product(scopes, CONSENSUS, ORDERS, gammas):
        drop = _setting(
            phases, policy="token_drop", scope=scope, consensus=name, order=order, factor=gamma
        )
        expanded = replace(drop, policy="expanded_drop")
        found += [drop, expanded, replace(expanded, extras="dropped")]
        if order == "score":  # the only order in which top-k and extras can compete
            found += [replace(expanded, tiers="one"), replace(drop, renormalize=True)]
    return _distinct(phases, found)


def label(setting: CapacityConfig) -> str:
    """Return a short name, unique in one report: `token_drop 1.5 rank quota`."""
    if setting.policy == "none":
        return "dropless"
    words = [setting.policy, str(setting.factor), setting.scope]
    for name in ("order", "consensus"):
        if (value := getattr(setting, name)) != getattr(_DEFAULT, name):
            words.append(value)
    for name in ("tiers", "extras", "expand"):
        if (value := getattr(setting, name)) != getattr(_DEFAULT, name):
            words.append(f"{name}={value}")
    if setting.renormalize:
        words.append("renormalize")
    return " ".join(words)


def to_json(setting: CapacityConfig) -> dict[str, Any]:
    """Return the setting as JSON values; `from_json` undoes it."""
    return {**asdict(setting), "phases": list(setting.phases)}


def from_json(values: dict[str, Any]) -> CapacityConfig:
    """Undo `to_json`.

    Raises:
        ValueError: a key that no setting has.
    """
    known = {item.name for item in fields(CapacityConfig)}
    if unknown := values.keys() - known:
        raise ValueError(f"capacity setting: unknown {', '.join(sorted(unknown))}")
    return CapacityConfig(**{**values, "phases": tuple(values["phases"])})


def _setting(phases: Sequence[RequestPhase], **values: Any) -> CapacityConfig:
    return CapacityConfig(phases=tuple(phases), **values)


def _distinct(
    phases: Sequence[RequestPhase], found: Sequence[CapacityConfig]
) -> list[CapacityConfig]:
    return list(dict.fromkeys([_setting(phases), *found]))
