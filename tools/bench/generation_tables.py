"""Tables of bench_generate.py: the candidates' rates, paired ratios, and the ranks' seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from bench.jobs import Job
from bench.report import mean_interval, table
from bench.roofline import RooflineBound

_HEADER = ["candidate", "ranks", "prefill tok/s", "decode tok/s", "generated tok/s", "total s"]
_HEADER += ["of the first's time", "equal", "peak MiB per rank"]
_RATIO_HEADER = ["generated tok/s, per round", "rounds", "mean ratio", "95% from", "to"]
_RANK_HEADER = ["candidate", "rank", "computing s", "moving s", "waiting s"]


def job_table(
    job: Job,
    figures: dict[str, Any],
    ranks: dict[str, int],
    bounds: tuple[RooflineBound, RooflineBound] | None,
) -> str:
    """Return one job's table.

    Args:
        figures: per candidate.
        ranks: number of ranks per candidate.
        bounds: of one new token per prompt and of all; None: not measured.
    """
    fastest_first = next(iter(figures.values()))["total_s"]
    rows = [
        [
            name,
            ranks[name],
            entry["prefill_tok_s"],
            entry["decode_tok_s"],
            entry["generated_tok_s"],
            entry["total_s"],
            entry["total_s"] / fastest_first,
            f"{entry['equal']}/{len(job.prompts)}",
            " ".join(f"{mib:.0f}" for mib in entry["peak_mib"]),
        ]
        for name, entry in figures.items()
    ]
    if bounds is not None:
        first, total = bounds[0].seconds, bounds[1].seconds
        prefill = job.prompt_tokens / first
        generated = len(job.prompts) * job.new_tokens / total
        share = total / fastest_first
        rows.append(["roofline bound", "", prefill, "", generated, total, share, "", ""])
    prompts = f"{len(job.prompts)} prompts, {job.prompt_tokens:,} tokens"
    return f"{job.name}: {prompts}, {job.new_tokens} new each\n{table(_HEADER, rows)}"


def paired_ratios(figures: dict[str, Any], name: str, other: str) -> dict[str, Any]:
    """Return the ratios of two candidates' generated tokens per second, with mean and interval.

    A ratio above 1: `name` generated more tokens per second than `other` in that round.
    """
    # Both generate the same number of tokens: the rates are as the seconds inverted.
    own, others = (figures[each]["total_seconds"]["all"] for each in (name, other))
    return mean_interval([theirs / mine for mine, theirs in zip(own, others, strict=True)])


def ratio_table(ratios: Mapping[str, dict[str, Any]]) -> str:
    """Return the table of `paired_ratios` by name, and every ratio below it."""
    rows, every = [], []
    for name, each in ratios.items():
        numbers = [f"{each[key]:.4f}" for key in ("mean", "low", "high")]
        rows.append([name, len(each["all"]), *numbers])
        which = f", {name}" if len(ratios) > 1 else ""
        every.append(f"per round{which}: " + " ".join(f"{ratio:.4f}" for ratio in each["all"]))
    return "\n".join([table(_RATIO_HEADER, rows), *every])


def rank_table(figures: dict[str, Any]) -> str:
    """Return how this engine's ranks spent their time and what that allows; "" without ranks."""
    seconds = {name: e["rank_seconds"] for name, e in figures.items() if "rank_seconds" in e}
    rows = [
        [name, rank, each["computing"], each["moving"], each["waiting"]]
        for name, ranks in seconds.items()
        for rank, each in enumerate(ranks)
    ]
    single = next((sum(r[0].values()) for r in seconds.values() if len(r) == 1), None)
    lines = []
    for name, ranks in seconds.items():
        if len(ranks) == 1 or single is None:
            continue
        mean = statistics.mean(each["computing"] for each in ranks)
        total = max(sum(each.values()) for each in ranks)
        if not mean:  # the profiler is off
            continue
        lines.append(
            f"{name}: {single / total:.3g} times as fast as one rank; at best, without "
            f"communication and waiting, {single / mean:.3g}"
        )
        if (barriers := figures[name].get("meeting")) is not None:
            every_ms, kept = barriers["every_ms"], barriers["share"]["median"]
            lines.append(
                f"  with a barrier after every {every_ms:.3g} ms of equal work, which leaves cores "
                f"{kept:.3g} of their speed here, {single / mean * kept:.3g}"
            )
    return "\n".join([table(_RANK_HEADER, rows), *lines]) if rows else ""
