"""Fault verdicts: who is missing, hung or out of step, from what a rank has seen. Pure.

Every rank publishes beats (`watchdog.py`); each observer keeps, by its own clock, how long every
rank has been silent and how long it has stood at the same place. In order of certainty:

    failed    a rank said that it failed, and with what
    lost      a rank has not been heard of: killed, stopped, or its host unreachable
    stalled   all are alive and nobody moves; named is the rank with the fewest collectives, or,
              where all have as many, the one that is somewhere else than most

Worked example: ranks 0, 2 and 3 wait in collective 57, a combine, and rank 1 in 56, a dispatch, and
that for longer than the limit: rank 1 has skipped or never reached a collective.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

State = Literal["starting", "running", "finishing", "failed", "left"]
_MOST_SHOWN = 16
# After a rank has failed the others get this long to leave in order: their collectives break too.
GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """How far a rank has come. layer: -1 outside of the layers. phase: its name. collective: how
    many it has started.
    """

    step: int = 0
    layer: int = -1
    phase: str = "other"
    collective: int = 0

    def __str__(self) -> str:
        layer = f"layer {self.layer}, " if self.layer >= 0 else ""
        return f"step {self.step}, {layer}{self.phase}, collective {self.collective}"


@dataclass(frozen=True, slots=True)
class Seen:
    """What an observer knows of a rank. silent_s: since its last beat. still_s: since it moved.
    text: what it failed with.
    """

    host: str
    state: State
    place: Place
    silent_s: float
    still_s: float
    text: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. lost: of silence. stalled: of everybody's standing still."""

    lost: float
    stalled: float

    @classmethod
    def of(cls, timeout_s: float) -> Limits:
        """Both verdicts fall within the timeout."""
        return cls(lost=max(1.0, min(timeout_s / 2, 10.0)), stalled=0.8 * timeout_s)


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict. ranks: whom it accuses."""

    ranks: tuple[int, ...]
    text: str


def judge(
    seen: Mapping[int, Seen], own: int, group: tuple[int, ...], limits: Limits
) -> Finding | None:
    """The verdict of rank `own`, None while nothing is wrong.

    seen: every rank, itself included. group: the ranks in lockstep with it; only those can stall
    together, but any rank's loss ends the run.
    """
    failed = [
        rank
        for rank, each in seen.items()
        if each.state == "failed" and rank != own and each.still_s > GRACE_S
    ]
    if failed:
        who = seen[failed[0]]
        place = f" in {who.place}" if who.place.collective else ""
        return Finding((failed[0],), f"rank {failed[0]} on {who.host} failed{place}: {who.text}")
    lost = [
        rank
        for rank, each in seen.items()
        if rank != own and each.state != "left" and each.silent_s > limits.lost
    ]
    if lost:
        told = "; ".join(_lost(rank, seen[rank]) for rank in lost[:_MOST_SHOWN])
        return Finding(tuple(lost), told)
    return _stalled(seen, group, limits)


def describe(finding: Finding, seen: Mapping[int, Seen]) -> str:
    """The report: the verdict, and where every rank was."""
    lines = [f"fault: {finding.text}"]
    for rank in sorted(seen)[:_MOST_SHOWN]:
        each = seen[rank]
        place = str(each.place) if each.place.collective else each.state
        lines.append(f"  rank {rank} on {each.host}: {place}")
    if len(seen) > _MOST_SHOWN:
        lines.append(f"  and {len(seen) - _MOST_SHOWN} more ranks")
    return "\n".join(lines)


def _lost(rank: int, who: Seen) -> str:
    last = f"in {who.place}" if who.place.collective else f"while {who.state}"
    return (
        f"rank {rank} on {who.host} has not been heard of for {who.silent_s:.1f} s: killed, "
        f"stopped or unreachable; it was last seen {last}"
    )


def _stalled(seen: Mapping[int, Seen], group: tuple[int, ...], limits: Limits) -> Finding | None:
    members = {rank: seen[rank] for rank in group if rank in seen}
    if len(members) < 2 or any(each.state != "running" for each in members.values()):
        return None
    still = min(each.still_s for each in members.values())
    if still <= limits.stalled:
        return None
    fewest = min(each.place.collective for each in members.values())
    behind = [rank for rank, each in members.items() if each.place.collective == fewest]
    if len(behind) == len(members):
        common, count = Counter(each.place for each in members.values()).most_common(1)[0]
        behind = [rank for rank, each in members.items() if each.place != common]
        if not behind or count == 1 and len(members) > 2:
            return Finding(
                (),
                f"no rank has moved for {still:.1f} s and all are at {common}: a collective that "
                "never ends, so look at the network between the ranks",
            )
    others = [rank for rank in members if rank not in behind]
    names = ", ".join(f"rank {rank} on {seen[rank].host}" for rank in behind[:_MOST_SHOWN])
    text = (
        f"{names} has been at {seen[behind[0]].place} for {still:.1f} s, while "
        f"{'rank' if len(others) == 1 else 'ranks'} {', '.join(map(str, others[:_MOST_SHOWN]))} "
        f"wait at {seen[others[0]].place}: it hangs there, or has skipped a collective"
    )
    return Finding(tuple(behind), text)
