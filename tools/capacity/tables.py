"""The report's text: a table per panel for the terminal, Markdown, records for the JSON line."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import isfinite
from typing import Any

from bench.report import table

from capacity.jobs import composition
from capacity.panel import Panel, Result
from capacity.scores import difference
from capacity.settings import to_json
from capacity.speed import front

LEGEND = """\
loss            nats per token of the text excerpts; +- is the paired standard error of the change
tasks           right answers in %, mean of the tasks; +- as above, in points
dropped, mass   share of the assignments under capacity dropped; of their combine weights kept
orphans         tokens under capacity that kept no expert, over all layers, in %
bound           S: the most loaded rank's rows before capacity over those after it
balance         (1 - 1/S) / (1 - 1/P), P: what perfect balance without drops would give
front           on the Pareto front of tasks (T) or loss (L) against the speed bound"""

_HEADER = ["setting", "loss", "change", "+-", "tasks", "change", "+-", "dropped", "mass"]
_HEADER += ["orphans", "bound", "balance", "front"]


def panel_text(panel: Panel) -> str:
    """Return a panel's title, batch line and table."""
    fronts = {measure: set(indices) for measure, indices in panel_fronts(panel).items()}
    rows = []
    for index, result in enumerate(panel.results):
        change = difference(result.scores, panel.reference.scores)
        scores, share = result.scores, result.speed.share_of_perfect
        rows.append(
            [
                result.name,
                f"{scores.loss:.4f}",
                f"{change.loss:+.4f}",
                f"{change.loss_error:.4f}",
                f"{100 * scores.accuracy:.2f}",
                f"{100 * change.accuracy:+.2f}",
                f"{100 * change.accuracy_error:.2f}",
                f"{100 * result.drop_rate:.1f}%",
                f"{result.gate_mass_kept:.3f}",
                f"{100 * orphan_share(result):.2f}",
                f"{result.speed.bound:.2f}",
                None if share is None else f"{share:.2f}",
                "".join(
                    letter
                    for letter, measure in (("T", "tasks"), ("L", "loss"))
                    if index in fronts[measure]
                ),
            ]
        )
    header = list(_HEADER)
    if any(result.measured is not None for result in panel.results):
        header.append("measured")
        for row, result in zip(rows, panel.results, strict=True):
            row.append(None if result.measured is None else f"{result.measured:.2f}")
    title = f"{panel.model}, {panel.ranks} ranks"
    return f"{title}\n{batch_line(panel)}\n{table(header, rows)}"


def batch_line(panel: Panel) -> str:
    """Return the contents of the job and its steps as text."""
    job = composition(panel.items, panel.ranks)
    items, tokens = job["items"], job["prompt_tokens"]
    assert isinstance(items, dict) and isinstance(tokens, dict)
    parts = ", ".join(f"{items[name]} {name} ({tokens[name]:,} tokens)" for name in sorted(items))
    steps = batch_steps(panel)
    ran = f"; {len(steps)} steps under capacity of {_range(steps)} tokens" if steps else ""
    return f"{parts}; prompt tokens per rank: {_range(job['rank_prompt_tokens'])}{ran}"


def batch_steps(panel: Panel) -> list[int]:
    """Return tokens of each step in which capacity applied, all ranks together."""
    return max((result.tokens for result in panel.results), key=len)


def panel_fronts(panel: Panel) -> dict[str, list[int]]:
    """Return indices of the results on the Pareto fronts of `tasks` and `loss` by speed bound.

    A setting that makes the layers slower than dropless is on neither.
    """
    able = [i for i, result in enumerate(panel.results) if result.speed.bound >= 1.0]
    measures = {"tasks": lambda scores: scores.accuracy, "loss": lambda scores: -scores.loss}
    return {
        name: [
            able[index]
            for index in front(
                [(panel.results[i].speed.bound, measure(panel.results[i].scores)) for i in able]
            )
        ]
        for name, measure in measures.items()
    }


def orphan_share(result: Result) -> float:
    """Return orphans over tokens subject to capacity, over all layers."""
    top_k = result.top_k
    return result.orphans * top_k / result.assignments if result.assignments else 0.0


def markdown(panels: Sequence[Panel]) -> str:
    """Return one Markdown table of all panels."""
    header = ["model, ranks", "policy", "order", "scope", "consensus", "gamma", "loss", "tasks %"]
    header += ["dropped", "speed bound", "measured"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for panel in panels:
        for result in panel.results:
            setting = result.setting
            where = f"{panel.model}, {panel.ranks}"
            if setting.policy == "none":
                cells = [where, "none", "", "", "", ""]
            else:
                policy = " ".join(
                    [
                        setting.policy,
                        *(["one tier"] if setting.tiers == "one" else []),
                        *(["extras for dropped"] if setting.extras == "dropped" else []),
                        *(["renormalized"] if setting.renormalize else []),
                    ]
                )
                cells = [where, policy, setting.order, setting.scope, setting.consensus]
                cells.append(str(setting.factor))
            scores = result.scores
            cells += [f"{scores.loss:.3f}", f"{100 * scores.accuracy:.1f}"]
            cells += [f"{100 * result.drop_rate:.1f}%", f"{result.speed.bound:.2f}"]
            cells.append("" if result.measured is None else f"{result.measured:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def panel_record(panel: Panel, reference_check: dict[str, Any] | None) -> dict[str, Any]:
    """Return a panel for the JSON line."""
    fronts = panel_fronts(panel)
    steps = batch_steps(panel)
    return {
        "model": panel.model,
        "ranks": panel.ranks,
        "job": composition(panel.items, panel.ranks),
        "step_tokens": steps,
        "reference_check": reference_check,
        "front": {
            measure: [panel.results[index].name for index in indices]
            for measure, indices in fronts.items()
        },
        "results": [_result_record(panel, result) for result in panel.results],
    }


def _result_record(panel: Panel, result: Result) -> dict[str, Any]:
    scores = result.scores
    change = difference(scores, panel.reference.scores)
    share = result.speed.share_of_perfect
    numbers: dict[str, Any] = {
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "loss_change": change.loss,
        "loss_change_error": change.loss_error,
        "accuracy": scores.accuracy,
        "accuracy_error": scores.accuracy_error,
        "accuracy_change": change.accuracy,
        "accuracy_change_error": change.accuracy_error,
        "drop_rate": result.drop_rate,
        "gate_mass_kept": result.gate_mass_kept,
        "orphan_share": orphan_share(result),
        "speed_bound": result.speed.bound,
        "perfect_balance": result.speed.perfect,
        "share_of_perfect_balance": share,
        "measured_speedup": result.measured,
        "seconds": result.seconds,
    }
    rounded = {
        key: None if n is None or not isfinite(n) else float(f"{n:.6g}")
        for key, n in numbers.items()
    }
    return {
        "setting": result.name,
        "capacity": to_json(result.setting),
        **rounded,
        "by_task": scores.by_task,
        "examples": [int(scores.nll_X.size), int(scores.hit_N.size)],
        "assignments": result.assignments,
        "dropped": result.dropped,
        "added": result.added,
        "orphans": result.orphans,
        "bytes_sent": result.bytes_sent,
    }


def _range(numbers: Any) -> str:
    low, high = min(numbers), max(numbers)
    if low == high:
        return f"{low:,}"
    return f"{low:,} to {high:,} (median {statistics.median(numbers):,.0f})"
