"""Tables of the balance report: text, Markdown and JSON, and whether demands are met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from bench.report import table

from capacity.balance import BalancePanel, BalanceResult
from capacity.balance_cases import MIXED
from capacity.jobs import composition
from capacity.scores import difference

LEGEND = """\
prompts         mixed: the whole evaluation job; text, tasks: its validation texts or tasks alone
loss, added     nats per token of the validation texts; what it exceeds dropless by, in % of it, and
                the standard error of that, paired by excerpt
tasks, added    exact greedy answers, %; points against dropless
share           mean rank's rows before drops over the most loaded rank's after, of prefill steps
of all          the same with the rows of decode tokens in these steps, which stay at home where
                capacity applies to prefill; without a policy share is of all rows too
planned         share that the placement promised for its calibration data, the least of domains
copies, dropped rows that copies computed, and rows that were dropped, of all rows in those steps
memory          added by copies, over all experts at 16 bits per weight
demand          most loss added, fewest points, least share; * is met, ! is not"""

_HEADER = [
    "mechanism",
    "prompts",
    "loss",
    "added",
    "+-",
    "tasks",
    "added",
    "share",
    "of all",
    "planned",
]
_HEADER += ["copies", "dropped", "memory", "demand"]


def loss_added(panel: BalancePanel, result: BalanceResult) -> tuple[float, float] | None:
    """Return the loss added to dropless and its standard error, both in % of dropless."""
    base = panel.reference(result).scores
    if not base.tokens_X.size:
        return None
    change = difference(result.scores, base)
    return 100 * change.loss / base.loss, 100 * change.loss_error / base.loss


def tasks_added(panel: BalancePanel, result: BalanceResult) -> float | None:
    """Return the points of task accuracy added to dropless."""
    base = panel.reference(result).scores
    return 100 * difference(result.scores, base).accuracy if base.hit_N.size else None


def is_met(panel: BalancePanel, result: BalanceResult) -> bool | None:
    """Return whether a case's demand is met; None where it has none."""
    demand = result.case.demand
    if demand is None:
        return None
    loss, tasks = loss_added(panel, result), tasks_added(panel, result)
    return (
        round(result.share, 3) >= demand.share
        and (not demand.exact or panel.is_exact(result))
        and (demand.loss is None or loss is None or loss[0] <= demand.loss)
        and (demand.tasks is None or tasks is None or tasks >= demand.tasks - 1e-9)
    )


def panel_text(panel: BalancePanel) -> str:
    """Return the table of one panel, and a line about what was run."""
    job = composition(panel.items, panel.ranks)
    items, tokens = job["items"], job["prompt_tokens"]
    assert isinstance(items, dict) and isinstance(tokens, dict)
    parts = ", ".join(f"{items[name]} {name} ({tokens[name]:,} tokens)" for name in sorted(items))
    drawn = ", ".join(f"{name} {count:,} tokens" for name, count in panel.calibration.items())
    head = f"{panel.model}, {panel.ranks} ranks\n{parts}\ncalibrated on {drawn}"
    rows = [_cells(panel, result) for result in panel.results]
    return f"{head}\n{table(_HEADER, rows, left=(0, 1, 13))}"


def markdown(panels: Sequence[BalancePanel]) -> str:
    """Return one Markdown table of all panels."""
    header = ["model, ranks", *_HEADER]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for panel in panels:
        for result in panel.results:
            cells = [f"{panel.model}, {panel.ranks}", *_cells(panel, result)]
            lines.append(f"| {' | '.join('' if c is None else c for c in cells)} |")
    return "\n".join(lines) + "\n"


def panel_record(panel: BalancePanel) -> dict[str, Any]:
    """Return a panel for the JSON line."""
    return {
        "model": panel.model,
        "ranks": panel.ranks,
        "job": composition(panel.items, panel.ranks),
        "calibration_tokens": dict(panel.calibration),
        "calibration_steps": panel.steps,
        "results": [_record(panel, result) for result in panel.results],
    }


def _cells(panel: BalancePanel, result: BalanceResult) -> list[str | None]:
    case, scores = result.case, result.scores
    loss, tasks, met = loss_added(panel, result), tasks_added(panel, result), is_met(panel, result)
    total = result.rows + result.dropped
    demand = None
    if case.demand is not None:
        demand = f"{'*' if met else '!'} {case.demand.text}"
    return [
        case.name,
        case.job,
        None if loss is None else f"{scores.loss:.4f}",
        None if loss is None else f"{loss[0]:+.3f}%",
        None if loss is None else f"{loss[1]:.3f}",
        None if tasks is None else f"{100 * scores.accuracy:.2f}",
        None if tasks is None else f"{tasks:+.2f}",
        f"{result.share:.3f}",
        f"{result.share_all:.3f}",
        None if result.planned_share is None else f"{result.planned_share:.3f}",
        f"{100 * result.copied / total:.1f}%" if total else None,
        f"{100 * result.dropped / total:.2f}%" if total else None,
        f"{100 * result.memory:.1f}%",
        demand,
    ]


def _record(panel: BalancePanel, result: BalanceResult) -> dict[str, Any]:
    case, loss = result.case, loss_added(panel, result)
    numbers: dict[str, float | None] = {
        "loss": None if loss is None else result.scores.loss,
        "loss_added_percent": None if loss is None else loss[0],
        "loss_added_error": None if loss is None else loss[1],
        "accuracy": result.scores.accuracy if result.scores.hit_N.size else None,
        "tasks_added_points": tasks_added(panel, result),
        "share": result.share,
        "share_of_all_rows": result.share_all,
        "planned_share": result.planned_share,
        "memory_added": result.memory,
        "seconds": result.seconds,
    }
    rounded = {
        key: None if n is None or not isfinite(n) else float(f"{n:.6g}")
        for key, n in numbers.items()
    }
    return {
        "mechanism": case.name,
        "copies": case.copies,
        "precision": case.precision if case.copies else None,
        "planned_for": case.planned_for if case.copies else None,
        "prompts": case.job,
        "gamma": case.gamma,
        **rounded,
        "rows": result.rows,
        "rows_copied": result.copied,
        "rows_dropped": result.dropped,
        "equals_dropless": panel.is_exact(result) if case.job == MIXED else None,
        "demand": None if case.demand is None else asdict(case.demand),
        "met": is_met(panel, result),
    }
