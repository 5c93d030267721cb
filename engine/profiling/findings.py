"""Findings: the straggler analysis as sentences, with advice. Pure.

One sentence for each cause that takes a twentieth of the group's time or more (a tenth in a run of
4 s, where noise alone takes that much); "balanced" where none does. A rank is named if it differs
from the others, because by chance every rank is a straggler now and then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from engine.profiling.straggler_causes import Analysis, RankAttribution

# Shares of the run's time from which a cause is reported. The noise of equal ranks in a run of 1 s
# is added to the first, and falls with the root of the time. Transfer is necessary work, so the
# network is reported from a quarter on.
_MIN_SHARE, _NOISE_SHARE, _MIN_NETWORK_SHARE = 0.05, 0.1, 0.25
_MIN_SECONDS = 0.25
# A rank is named when it caused this share of the wait due to a cause.
_MAJORITY = 0.6


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding."""

    text: str
    cause: str  # of `straggler_causes.CAUSES`, or balanced, or unknown
    ranks: list[int]  # the ranks that it names
    share: float  # of the run's time
    layer: int | None = None  # where it is worst, if that is known


@dataclass(frozen=True, slots=True)
class HotExpert:
    """The expert of which one rank computed the most rows over its layer's mean expert."""

    layer: int
    expert: int
    over_mean: float
    is_copy: bool = False  # whether the rank has a copy of it, and its home is elsewhere


def findings(
    analysis: Analysis,
    hottest: dict[int, HotExpert],
    policy: str = "none",
    has_copies: bool = False,
) -> list[Finding]:
    """Return the findings about one group, the costliest first; [] where the profiler was off.

    Args:
        hottest: rank -> its hottest expert, after capacity.
        policy: moe.capacity.policy of the run.
        has_copies: whether its placement has copies of experts.
    """
    if not analysis.seconds and len(analysis.ranks) > 1:
        return []  # nothing was timed
    if len(analysis.ranks) == 1:
        return [Finding("one rank: no other rank to wait for", "balanced", [], 0.0)]
    if analysis.seconds < _MIN_SECONDS:
        text = f"run too short: {analysis.seconds:.2f} s of steps in which all ranks were timed"
        return [Finding(text, "unknown", [], 0.0)]
    found = [
        each
        for each in (
            _load(analysis, hottest, _balance_advice(policy, has_copies)),
            _tokens(analysis),
            *(_device(analysis, rank) for rank in analysis.ranks),
            *(_host(analysis, rank) for rank in analysis.ranks),
            _network(analysis),
        )
        if each is not None
    ]
    if not found:
        waiting = sum(value for cause, value in analysis.wait_caused.items() if cause != "network")
        share = waiting / analysis.seconds
        text = (
            f"balanced: waiting for stragglers takes {share:.0%} of the time, and no rank, link or "
            "host is an outlier"
        )
        return [Finding(text, "balanced", [], share)]
    return sorted(found, key=lambda each: -each.share)


def join_replicas(
    found: Mapping[int, Sequence[Finding]], ranks: Mapping[int, Sequence[int]]
) -> list[Finding]:
    """Join the findings about groups that step independently, the costliest first.

    Where no group has one, the result is the "balanced" of the group that waits most.

    Args:
        found: replica -> its findings.
        ranks: replica -> its global ranks, in order.
    """
    if len(found) == 1:
        return list(next(iter(found.values())))
    joined = [
        replace(each, text=f"replica {replica} ({_span(ranks[replica])}): {each.text}")
        for replica, own in found.items()
        for each in own
    ]
    joined.sort(key=lambda each: -each.share)
    return [each for each in joined if each.cause not in ("balanced", "unknown")] or joined[:1]


def _span(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"


def _is_significant(analysis: Analysis, share: float) -> bool:
    """Return whether a share of the run's time is more than the noise of equal ranks."""
    return share >= _MIN_SHARE + _NOISE_SHARE / max(1.0, analysis.seconds) ** 0.5


def _main_rank(analysis: Analysis, cause: str) -> RankAttribution | None:
    """Return the rank that caused most of the wait due to `cause`, if there is one."""
    worst = max(analysis.ranks, key=lambda rank: rank.wait_caused[cause])
    return worst if worst.wait_caused[cause] >= _MAJORITY * analysis.wait_caused[cause] else None


def _balance_advice(policy: str, has_copies: bool) -> str:
    """Return what helps against unequal loads: copies of experts, or else capacity."""
    copies = "more copies, planned for" if has_copies else "copies of hot experts, planned from"
    capacity = (
        "moe.capacity.policy = token_drop with scope = rank bounds it"
        if policy == "none"
        else "a smaller moe.capacity.factor bounds it further"
    )
    return (
        f"{copies} a recording of these loads (profiler.routing, then tools/plan_placement.py), "
        f"balance it; or {capacity}"
    )


def _load(analysis: Analysis, hottest: dict[int, HotExpert], advice: str) -> Finding | None:
    share = analysis.share("load")
    if not _is_significant(analysis, share):
        return None
    worst = _main_rank(analysis, "load")
    if worst is None or worst.relative_load < 1.02:
        layer = max(range(len(analysis.layers)), key=analysis.layers.__getitem__)
        text = (
            f"unequal expert loads take {share:.0%} of the time, and the most loaded rank changes "
            f"from step to step (longest wait: layer {layer}); {advice}"
        )
        return Finding(text, "load", [], share, layer)
    text = (
        f"rank {worst.rank} is the straggler in {worst.straggler_share:.0%} of the steps, which "
        f"takes {share:.0%} of the time: its experts have {worst.relative_load:.1f}x the mean load"
    )
    hot = hottest.get(worst.rank)
    if hot is not None:
        which = f"its copy of expert {hot.expert}" if hot.is_copy else f"expert {hot.expert}"
        text += f" (layer {hot.layer}, {which} alone {hot.over_mean:.1f}x)"
    return Finding(f"{text}; {advice}", "load", [worst.rank], share, hot.layer if hot else None)


def _tokens(analysis: Analysis) -> Finding | None:
    share = analysis.share("tokens")
    if not _is_significant(analysis, share):
        return None
    worst = _main_rank(analysis, "tokens")
    which = "a different rank in each step has" if worst is None else f"rank {worst.rank} has"
    text = (
        f"{which} more tokens of its own in attention than the others, which takes {share:.0%} of "
        "the time; a smaller scheduler.max_batch_tokens makes the steps more equal"
    )
    return Finding(text, "tokens", [] if worst is None else [worst.rank], share)


def _device(analysis: Analysis, rank: RankAttribution) -> Finding | None:
    share = rank.wait_caused["device"] / analysis.seconds
    if not _is_significant(analysis, share):
        return None
    text = (
        f"rank {rank.rank} on {rank.host} computes {rank.relative_compute_time - 1:.0%} slower "
        f"than its peers at equal load: a slow device, which takes {share:.0%} of the time; check "
        "its clock rates, its temperature and which other processes use it, or set "
        "moe.capacity.speed_aware = true"
    )
    return Finding(text, "device", [rank.rank], share)


def _host(analysis: Analysis, rank: RankAttribution) -> Finding | None:
    """Report what a rank's host takes beyond the median of the others, which is noise."""
    others = [other for other in analysis.ranks if other is not rank]
    beyond = rank.wait_caused["host"] - median(other.wait_caused["host"] for other in others)
    share = beyond / analysis.seconds
    if not _is_significant(analysis, share):
        return None
    if rank.process_stalls is not None:
        count, seconds = rank.process_stalls
        why = (
            f"its process did not run {count} times, {seconds * 1e3:.0f} ms each: stopped, swapped "
            "out or without a free core; check what else runs on its host then"
        )
    elif rank.stalled_steps is not None:
        steps, seconds = rank.stalled_steps
        why = (
            f"it stalled in {steps} steps, {seconds * 1e3:.0f} ms each; check what else runs on "
            "its host then"
        )
    else:
        usual = median(other.host_ms for other in others)
        why = (
            f"between the layers it takes {rank.host_ms:.1f} ms per step, the others {usual:.1f} "
            "(reading, sampling, writing)"
        )
    text = f"the host of rank {rank.rank}, {rank.host}, takes {share:.0%} of the time: {why}"
    return Finding(text, "host", [rank.rank], share)


def _network(analysis: Analysis) -> Finding | None:
    share = analysis.share("network")
    if share < _MIN_NETWORK_SHARE:
        return None
    hosts = sorted({rank.host for rank in analysis.ranks})
    where = f" between {hosts[0]} and {hosts[1]}" if len(hosts) == 2 else ""
    text = (
        f"the network{where} takes {share:.0%} of the time: each rank transfers its rows at "
        f"{_rate(analysis.bytes_per_second)}; moe.overlap.chunks overlaps transfer with the "
        "experts, moe.dispatch.dtype = bf16 sends less"
    )
    return Finding(text, "network", [], share)


def _rate(bytes_per_second: float) -> str:
    if bytes_per_second >= 1e9:
        return f"{bytes_per_second / 1e9:.1f} GB/s"
    return f"{bytes_per_second / 1e6:.0f} MB/s"
