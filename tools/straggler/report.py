"""Reads what the page shows of a job's *.report.json (written by `engine/batch/`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_AGAIN = "name the *.report.json that the job wrote next to its output"


@dataclass(frozen=True, slots=True)
class LayerDrops:
    """Drops of one layer."""

    layer: int
    assignments: int  # those subject to capacity
    dropped: int
    orphans: int
    drop_rate: float
    gate_mass_kept: float


@dataclass(frozen=True, slots=True)
class JobReport:
    """What the page shows of a report."""

    findings: list[str]  # sentences, the costliest first
    facts: list[tuple[str, str]]  # (name, text) of the whole job
    drops: list[LayerDrops]


def read_report(path: Path, world_size: int) -> JobReport:
    """Read a report and check that it is of a run of `world_size` ranks.

    Raises:
        ValueError: it cannot be read, is no report, had nothing to run, or is of another run.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--report {path}: {error.strerror}; {_AGAIN}") from error
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(f"{path}:{line}: not JSON ({error}); {_AGAIN}") from error
    run = value.get("run") if isinstance(value, dict) else None
    if not isinstance(run, dict):
        raise ValueError(
            f"{path}:1: has no run (the job had nothing left to do, or it is another file); "
            f"{_AGAIN}"
        )
    try:
        ranks = run["ranks"]
        found = JobReport(
            findings=[str(each["text"]) for each in run.get("verdict", [])],
            facts=_facts(value, run),
            drops=[_drops(layer) for layer in run["layers"]],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a report of this format ({type(error).__name__}: {error}); {_AGAIN}"
        ) from error
    if len(ranks) != world_size:
        raise ValueError(
            f"{path}: is of {len(ranks)} ranks, the span files are of {world_size}; name the "
            "report of the same run"
        )
    return found


def _facts(value: dict[str, Any], run: dict[str, Any]) -> list[tuple[str, str]]:
    seconds = float(run["seconds"])
    facts = [("time", f"{seconds:,.2f} s, {int(run['steps']):,} steps")]
    for key in ("requests", "prompt_tokens", "generated_tokens"):
        if key in value:
            count, rate = int(value[key]), int(value[key]) / max(seconds, 1e-9)
            facts.append((key.replace("_", " "), f"{count:,} ({rate:,.1f} per second)"))
    slowest = max(run["ranks"], key=lambda rank: float(rank.get("slowness", 1.0)), default=None)
    if slowest is not None and float(slowest.get("slowness", 1.0)) > 1:
        facts.append(
            (
                "slowest at equal load",
                f"rank {slowest['rank']} on {slowest['host']}, "
                f"{float(slowest['slowness']) - 1:+.0%} to its peers",
            )
        )
    late = max(run["ranks"], key=lambda rank: float(rank.get("late_share", 0.0)), default=None)
    if late is not None and float(late.get("late_share", 0.0)) > 0:
        facts.append(
            (
                "waited for most",
                f"rank {late['rank']} on {late['host']}, in {float(late['late_share']):.0%} of the "
                "steps",
            )
        )
    placement = run.get("placement")
    if isinstance(placement, dict) and int(placement["copies"]):
        before, after = float(placement["share"]), float(placement["share_after"])
        text = f"{before:.1%} by homes alone, {after:.1%} with copies"
        facts.append(("share of perfect balance", text))
    capacity = value.get("capacity")
    if isinstance(capacity, dict) and "policy" in capacity:
        facts.append(("capacity policy", str(capacity["policy"])))
    return facts


def _drops(layer: dict[str, Any]) -> LayerDrops:
    return LayerDrops(
        layer=int(layer["layer"]),
        assignments=int(layer.get("assignments", 0)),
        dropped=int(layer.get("dropped", 0)),
        orphans=int(layer.get("orphans", 0)),
        drop_rate=float(layer.get("drop_rate", 0.0)),
        gate_mass_kept=float(layer.get("gate_mass_kept", 1.0)),
    )
