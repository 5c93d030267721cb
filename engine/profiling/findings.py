"""Verdicts: the straggler analysis in words, and what to do about it. Pure.

One sentence a cause that costs the group a twentieth of its time or more (a tenth in a run of 4 s,
where chance alone costs that much); "balanced" where nothing does. A rank is named where it stands
out among the others, since chance makes every rank late now and then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from engine.profiling.straggler_causes import Analysis, RankAttribution

# Share of the run from which a cause is worth a sentence, and what chance makes of equal ranks in a
# run of a second; it averages out with the root of the time. Transfer is work and no mistake: it is
# only told when it takes a quarter.
_WORTH, _BY_CHANCE, _WORTH_NETWORK = 0.05, 0.1, 0.25
_SHORT_S = 0.25
# A rank is named when it caused this much of what was lost to a cause.
_MAINLY = 0.6


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. cause: of `straggler.CAUSES`, or balanced, or unknown. ranks: whom it names.
    share: of the run's time. layer: where it is worst, None where that says nothing.
    """

    text: str
    cause: str
    ranks: list[int]
    share: float
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class HotExpert:
    """The expert with the most rows over its layer's mean among one rank's experts."""

    layer: int
    expert: int
    over_mean: float


def verdicts(
    analysis: Analysis, hottest: dict[int, HotExpert], policy: str = "none"
) -> list[Finding]:
    """Findings, the costliest first.

    hottest: rank -> its hottest expert, after capacity. policy: moe.capacity.policy of the run.
    None where the profiler was off.
    """
    if not analysis.seconds and len(analysis.ranks) > 1:
        return []  # nothing was timed
    if len(analysis.ranks) == 1:
        return [Finding("one rank: nobody to wait for", "balanced", [], 0.0)]
    if analysis.seconds < _SHORT_S:
        text = f"too short to tell: {analysis.seconds:.2f} s of steps with all ranks' times"
        return [Finding(text, "unknown", [], 0.0)]
    found = [
        verdict
        for verdict in (
            _load(analysis, hottest, policy),
            _tokens(analysis),
            *(_device(analysis, blame) for blame in analysis.ranks),
            *(_host(analysis, blame) for blame in analysis.ranks),
            _network(analysis),
        )
        if verdict is not None
    ]
    if not found:
        waiting = sum(value for cause, value in analysis.lost.items() if cause != "network")
        share = waiting / analysis.seconds
        text = (
            f"balanced: waiting for late ranks takes {share:.0%} of the time, and no rank, link or "
            "host stands out"
        )
        return [Finding(text, "balanced", [], share)]
    return sorted(found, key=lambda verdict: -verdict.share)


def of_replicas(
    found: Mapping[int, Sequence[Finding]], ranks: Mapping[int, Sequence[int]]
) -> list[Finding]:
    """Join the findings of groups that each step on their own, the costliest first; where none has
    any, what is said of the group that waits most.

    found, ranks: replica -> its verdicts, and its global ranks in order.
    """
    if len(found) == 1:
        return list(next(iter(found.values())))
    told = [
        replace(verdict, text=f"replica {replica} ({_span(ranks[replica])}): {verdict.text}")
        for replica, own in found.items()
        for verdict in own
    ]
    told.sort(key=lambda verdict: -verdict.share)
    return [each for each in told if each.cause not in ("balanced", "unknown")] or told[:1]


def _span(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


def _is_worth(analysis: Analysis, share: float) -> bool:
    """Whether a share of the run's time is more than chance makes of equal ranks."""
    return share >= _WORTH + _BY_CHANCE / max(1.0, analysis.seconds) ** 0.5


def _main_rank(analysis: Analysis, cause: str) -> RankAttribution | None:
    """The rank that caused most of what was lost to `cause`, if there is one."""
    worst = max(analysis.ranks, key=lambda blame: blame.lost[cause])
    return worst if worst.lost[cause] >= _MAINLY * analysis.lost[cause] else None


def _load(analysis: Analysis, hottest: dict[int, HotExpert], policy: str) -> Finding | None:
    share = analysis.share("load")
    if not _is_worth(analysis, share):
        return None
    advice = (
        "moe.capacity.policy = token_drop with scope = rank bounds it"
        if policy == "none"
        else "a smaller moe.capacity.factor bounds it further"
    )
    worst = _main_rank(analysis, "load")
    if worst is None or worst.load < 1.02:
        layer = max(range(len(analysis.layers)), key=analysis.layers.__getitem__)
        text = (
            f"unequal expert loads cost {share:.0%} of the time, and the most loaded rank changes "
            f"from step to step (most is lost in layer {layer}); {advice}"
        )
        return Finding(text, "load", [], share, layer)
    text = (
        f"rank {worst.rank} is late in {worst.late_share:.0%} of the steps, which costs "
        f"{share:.0%} of the time: its experts hold {worst.load:.1f}x the mean load"
    )
    hot = hottest.get(worst.rank)
    if hot is not None:
        text += f" (layer {hot.layer}, expert {hot.expert} alone {hot.over_mean:.1f}x)"
    return Finding(f"{text}; {advice}", "load", [worst.rank], share, hot.layer if hot else None)


def _tokens(analysis: Analysis) -> Finding | None:
    share = analysis.share("tokens")
    if not _is_worth(analysis, share):
        return None
    worst = _main_rank(analysis, "tokens")
    who = "ranks take turns at having" if worst is None else f"rank {worst.rank} has"
    text = (
        f"{who} more tokens of its own in attention than the others, which costs {share:.0%} of "
        "the time; a smaller scheduler.max_batch_tokens evens the steps out"
    )
    return Finding(text, "tokens", [] if worst is None else [worst.rank], share)


def _device(analysis: Analysis, blame: RankAttribution) -> Finding | None:
    share = blame.lost["device"] / analysis.seconds
    if not _is_worth(analysis, share):
        return None
    text = (
        f"rank {blame.rank} on {blame.host} computes {blame.slowness - 1:.0%} slower than its "
        f"peers at equal load: a slow device, which costs {share:.0%} of the time; look at its "
        "clocks, its temperature and who else uses it, or set moe.capacity.speed_aware = true"
    )
    return Finding(text, "device", [blame.rank], share)


def _host(analysis: Analysis, blame: RankAttribution) -> Finding | None:
    """Chance makes everybody late: only what a rank has beyond the others counts."""
    others = [other for other in analysis.ranks if other is not blame]
    beyond = blame.lost["host"] - median(other.lost["host"] for other in others)
    share = beyond / analysis.seconds
    if not _is_worth(analysis, share):
        return None
    if blame.absences is not None:
        times, seconds = blame.absences
        why = (
            f"its process did not run {times} times, {seconds * 1e3:.0f} ms each: stopped, swapped "
            "out or without a core; look for what else its host does then"
        )
    elif blame.stalls is not None:
        steps, seconds = blame.stalls
        why = (
            f"it stalled in {steps} steps, {seconds * 1e3:.0f} ms each; look for what else its "
            "host does then"
        )
    else:
        usual = median(other.host_ms for other in others)
        why = (
            f"between the layers it takes {blame.host_ms:.1f} ms a step, the others {usual:.1f} "
            "(reading, sampling, writing)"
        )
    text = f"rank {blame.rank} on {blame.host} loses {share:.0%} of the time on its host: {why}"
    return Finding(text, "host", [blame.rank], share)


def _network(analysis: Analysis) -> Finding | None:
    share = analysis.share("network")
    if share < _WORTH_NETWORK:
        return None
    hosts = sorted({blame.host for blame in analysis.ranks})
    where = f" between {hosts[0]} and {hosts[1]}" if len(hosts) == 2 else ""
    text = (
        f"the network{where} takes {share:.0%} of the time: a rank's rows travel at "
        f"{_rate(analysis.bytes_per_second)}; moe.overlap.chunks hides transfer behind the "
        "experts, moe.dispatch.dtype = bf16 sends less"
    )
    return Finding(text, "network", [], share)


def _rate(bytes_per_second: float) -> str:
    if bytes_per_second >= 1e9:
        return f"{bytes_per_second / 1e9:.1f} GB/s"
    return f"{bytes_per_second / 1e6:.0f} MB/s"
