"""Summary: what a finished job prints and writes as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from engine.config import CapacityConfig
from engine.distributed.standard_streams import make_safe
from engine.profiling.report import RoutingReport, RunReport
from engine.reporting.capacity_table import print_capacity
from engine.reporting.comms_table import print_comms
from engine.reporting.copies_table import mib, print_copies
from engine.reporting.straggler_table import print_stragglers
from engine.reporting.table import new_table

_WIDTH = 100
_MAX_KEYS = 8  # shown of the users' own
# Fields of the report dataclasses -> their keys in the JSON file, whose format is fixed.
_JSON_KEYS = {
    "relative_compute_time": "slowness",
    "straggler_share": "late_share",
    "wait_caused": "lost",
    "wait": "lost",
    "wait_by_cause": "lost_by_cause",
    "resolved_settings": "resolved",
    "process_stall_seconds": "absent",
    "findings": "verdict",
}
# Fields without a key in the JSON file where they are None.
_ONLY_WHERE_USED = (
    "placement",
    "plan",
    "expert_cost",
    "shared_rows_moved",
    "state_bytes",
    "surplus_rows",
    "zero_assignments",
    "ranked_by",
    "policy",
)
_HEADINGS = {"communication": "communi-\ncation"}
_SHORT = {"attention": "atten-\ntion"}


def make_console(
    *, file: IO[str] | None = None, stderr: bool = False, quiet: bool = False
) -> Console:
    """Return a console; in a file or a pipe its lines are as wide as the tables need.

    Printing to standard output or error never raises.

    Args:
        file: where to print; None for standard output or error.
        stderr: print to standard error.
        quiet: print nothing.
    """
    console = Console(file=file or make_safe(stderr=stderr), stderr=stderr, quiet=quiet)
    if not console.is_terminal:
        console.width = _WIDTH
    return console


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A finished job."""

    total: int  # requests of the job
    resumed: int  # of them, completed by earlier runs
    errors: int  # error records in the output
    requests: int  # completed by this run
    prompt_tokens: int  # of this run
    generated_tokens: int  # of this run
    run: RunReport | None  # None where nothing was left to run
    cached_tokens: int = 0  # prompt tokens of this run that did not run: common prefixes
    retried: int = 0  # requests run again because their record was an error
    capacity: CapacityConfig = field(default_factory=CapacityConfig)  # of this run
    user_keys: dict[str, int] = field(default_factory=dict)  # lines of this run per key of the
    # user's own, which had no effect
    shared_prefixes: dict[str, Any] | None = None  # of the lines that were pending when this run
    # began: lines, prefixes, prompt_share; None where they ran in input order
    error_file: Path | None = None  # with the error records, where the output has none

    def to_json(self) -> str:
        """Return everything as JSON, latencies as percentiles."""
        values: dict[str, Any] = {
            key: getattr(self, key)
            for key in self.__dataclass_fields__
            if key not in ("run", "capacity", "retried", "shared_prefixes", "error_file")
        }
        if self.shared_prefixes is not None:
            values["shared_prefixes"] = self.shared_prefixes
        if self.retried:
            values["retried"] = self.retried
        values["capacity"] = asdict(self.capacity)
        if self.run is not None:
            run = asdict(self.run, dict_factory=_rename_keys)
            if run["routing"] is None:
                del run["routing"]
            values["run"] = run | {"latencies": percentiles(self.run)}
        return json.dumps(values, indent=2) + "\n"


def _rename_keys(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {
        _JSON_KEYS.get(name, name): value
        for name, value in fields
        if name not in _ONLY_WHERE_USED or value is not None
    }


def percentiles(run: RunReport) -> dict[str, dict[str, float]]:
    """Return the 50th and 99th percentile of each latency that has values, in seconds."""
    return {
        name: {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99))}
        for name, values in run.latencies.items()
        if len(values)
    }


def print_summary(console: Console, summary: Summary) -> None:
    """Print throughput, latency, where each rank's time went, capacity and stragglers."""
    run = summary.run
    if run is not None:
        console.print(_throughput(summary, run))
        if latencies := percentiles(run):
            console.print(_latency(latencies))
        console.print(_ranks(run))
        print_copies(console, run)
        print_capacity(console, run, summary.capacity)
        print_stragglers(console, run)
        print_comms(console, run)
        for line in () if run.plan is None else run.plan.text:
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        if run.routing is not None:
            line = _routing(run.routing, run.steps)
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    counts = [f"{summary.total} requests"]
    if summary.resumed:
        counts.append(f"{summary.resumed} of them by earlier runs")
    if summary.retried:
        counts.append(f"{summary.retried} run again after an error")
    if summary.errors:
        where = "" if summary.error_file is None else f" in {summary.error_file}"
        counts.append(f"{summary.errors} with an error record{where}")
    console.print(", ".join(counts) + ".", highlight=False, soft_wrap=True, markup=False)
    if summary.shared_prefixes is not None:
        console.print(describe_shared(summary.shared_prefixes), highlight=False, soft_wrap=True)
    if summary.user_keys:
        console.print(_user_keys(summary.user_keys), highlight=False, soft_wrap=True, markup=False)


def describe_shared(shared: dict[str, Any]) -> str:
    """Return a sentence about the lines that share prefixes."""
    prefixes = "1 prefix" if shared["prefixes"] == 1 else f"{shared['prefixes']:,} prefixes"
    return (
        f"{_count(shared['lines'])} share {prefixes}, {shared['prompt_share']:.0%} of all prompts; "
        "ordered and dealt to the ranks by them."
    )


def _routing(routing: RoutingReport, steps: int) -> str:
    claims = "" if routing.claims_steps is None else f", with claims of {routing.claims_steps:,}"
    return (
        f"Routing of {routing.steps:,} of {steps:,} steps recorded in {routing.folder}, segment "
        f"{routing.segment}{claims}."
    )


def _user_keys(lines: dict[str, int]) -> str:
    names = sorted(lines, key=lambda name: (-lines[name], name))
    shown = [f"{name!r} ({_count(lines[name])})" for name in names[:_MAX_KEYS]]
    more = f" and {len(names) - _MAX_KEYS} more" if len(names) > _MAX_KEYS else ""
    return f"Keys that are no settings had no effect: {', '.join(shown)}{more}."


def _count(lines: int) -> str:
    return "1 line" if lines == 1 else f"{lines:,} lines"


def _throughput(summary: Summary, run: RunReport) -> Table:
    seconds = max(run.seconds, 1e-9)
    table = new_table("Throughput", "count", "per second")
    for name, count in (
        ("requests", summary.requests),
        ("prompt tokens", summary.prompt_tokens),
        ("generated tokens", summary.generated_tokens),
    ):
        table.add_row(name, f"{count:,}", f"{count / seconds:,.1f}")
    table.caption = f"{run.seconds:.2f} s, {run.steps} steps, max/mean load {run.max_over_mean:.2f}"
    if summary.cached_tokens:
        share = summary.cached_tokens / summary.prompt_tokens
        table.caption += f", {share:.1%} of prompt tokens cached"
    return table


def _latency(latencies: dict[str, dict[str, float]]) -> Table:
    table = new_table("Latency", "p50", "p99")
    for key, name in (("ttft", "time to first token"), ("tpot", "time per later token")):
        if key in latencies:
            table.add_row(name, *(_duration(latencies[key][point]) for point in ("p50", "p99")))
    return table


def _ranks(run: RunReport) -> Table:
    kinds = list(dict.fromkeys(kind for rank in run.ranks for kind in rank.seconds))
    counted = ("host", "prefill\ntokens", "decode\ntokens", "expert\nrows")
    timed = [_HEADINGS.get(kind, kind) for kind in kinds]
    if run.has_copies:  # makes room for a column more
        timed = [_SHORT.get(heading, heading) for heading in timed]
    table = new_table("Rank", *counted, *timed, *(["copies\nMiB"] if run.has_copies else []))
    for rank in run.ranks:
        counts = (rank.tokens_prefill, rank.tokens_decode, rank.expert_rows)
        table.add_row(
            str(rank.rank),
            rank.host,
            *(f"{count:,}" for count in counts),
            *(f"{rank.seconds.get(kind, 0.0):.2f}" for kind in kinds),
            *([mib(rank.placement.copy_bytes)] if run.has_copies and rank.placement else []),
        )
    table.caption = "seconds in each kind of work"
    return table


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
