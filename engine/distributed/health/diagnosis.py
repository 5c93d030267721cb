"""Fault verdicts: from what one rank has seen of the others to who is to blame. Pure functions.

Every rank publishes beats (`beacon.py`); each observer ages them by its own clock (`sightings.py`).
In order of certainty:

    failed     a rank said that it failed, and with what
    lost       a rank has not been heard of: killed, stopped, or its host unreachable
    stalled    all are alive and nobody moves, though somebody waits in a collective, or, outside
               of the lockstep, for another rank's part: named is the rank that is not there
    cut off    all are alive, but a collective broke: named as in a stall, and sooner

Worked example: ranks 0, 2 and 3 wait in collective 57, a combine, and rank 1 in 56, a dispatch, and
that for longer than the limit: rank 1 has skipped or never reached a collective.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.distributed.health.progress import Progress, State

_MOST_SHOWN = 16


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """What an observer knows of a rank.

    heartbeat_age_s: seconds since its last heartbeat. progress_age_s: since its state or place
    changed. text: what it failed with.
    """

    host: str
    state: State
    place: Progress
    heartbeat_age_s: float
    progress_age_s: float
    text: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. period: between two beats. lost: of silence. stalled: of everybody's standing still.

    quick: of silence once a collective broke, which says that somebody is gone; also from a rank's
    failure to a verdict, as the others mostly leave because of it by themselves. cut: from a broken
    collective to a verdict on ranks that are all still there.
    """

    period: float
    lost: float
    quick: float
    cut: float
    stalled: float

    @classmethod
    def of(cls, timeout_s: float, world_size: int = 1) -> Limits:
        """All verdicts fall well within the timeout, if that is 2 s or more: the survivors have to
        agree on one and to leave, on hosts that may be busy.

        Ranks beyond 256 beat more slowly: in each period the store hands every rank's beat to every
        rank, and its one thread manages about half a million a second.
        """
        period = min(max(timeout_s / 40, 0.1), 0.5) * max(1.0, world_size / 256) ** 2
        lost = max(1.0, min(timeout_s / 2, 10.0), 4 * period)
        quick = min(lost, max(1.0, 4 * period))
        return cls(period, lost, quick, cut=quick + 4 * period, stalled=0.6 * timeout_s)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A verdict. ranks: whom it accuses. lost: of silence, so they may not know of it."""

    ranks: tuple[int, ...]
    text: str
    lost: bool = False


def diagnose(
    seen: Mapping[int, PeerStatus], own: int, group: Iterable[int], limits: Limits
) -> Diagnosis | None:
    """The verdict of rank `own`, None while nothing is wrong.

    seen: every rank, itself included. group: the ranks in lockstep with it; only those can stall
    together, but any rank's loss ends the run.
    """
    cut = any(each.state == "cut" for each in seen.values())
    others = {rank: each for rank, each in seen.items() if rank != own}
    failed = [
        (each.progress_age_s, -rank)
        for rank, each in others.items()
        if each.state == "failed" and (cut or each.progress_age_s >= limits.quick)
    ]
    if failed:
        first = -max(failed)[1]  # the others may have failed because of it
        return _failed(first, seen[first])
    lost = [
        rank
        for rank, each in others.items()
        if each.state not in ("failed", "left")
        and each.heartbeat_age_s >= (limits.quick if cut else limits.lost)
    ]
    if lost:
        return Diagnosis(tuple(lost), _several(_lost(rank, seen[rank]) for rank in lost), lost=True)
    return _hung_outside(seen, limits) or _stalled({rank: seen[rank] for rank in group}, limits)


def store_lost(
    holder: int | None, seen: Mapping[int, PeerStatus], heartbeat_age_s: float
) -> Diagnosis:
    """The verdict when the store, which rank `holder` or the launcher holds, does not answer."""
    if holder is None:
        silent = f"{heartbeat_age_s:.1f} s"
        return Diagnosis(
            (), f"the launcher's store has not answered for {silent}: look for its own error"
        )
    who = seen[holder]
    if who.state == "failed":
        return _failed(holder, who)
    text = f"rank {holder} on {who.host}, which holds the store, has not answered for"
    return Diagnosis((holder,), f"{text} {heartbeat_age_s:.1f} s: {_GONE} {_last(who)}", lost=True)


def describe(finding: Diagnosis, seen: Mapping[int, PeerStatus]) -> str:
    """The report: the verdict, and where every rank was."""
    lines = [f"fault: {finding.text}"]
    for rank in sorted(seen)[:_MOST_SHOWN]:
        each = seen[rank]
        lines.append(f"  rank {rank} on {each.host}: {_where(each)}")
    if len(seen) > _MOST_SHOWN:
        lines.append(f"  and {len(seen) - _MOST_SHOWN} more ranks")
    return "\n".join(lines)


def _where(who: PeerStatus) -> str:
    """In the lockstep the place, otherwise what it does, otherwise its state."""
    if who.place.collective or (who.place.step and who.state not in ("left", "failed")):
        return str(who.place)
    return "cut off by the failure" if who.state == "cut" else who.state


_GONE = "killed, stopped or unreachable;"


def _failed(rank: int, who: PeerStatus) -> Diagnosis:
    place = f" in {who.place}" if who.place.collective else ""
    return Diagnosis((rank,), f"rank {rank} on {who.host} failed{place}: {who.text}")


def _lost(rank: int, who: PeerStatus) -> str:
    text = f"rank {rank} on {who.host} has not been heard of for {who.heartbeat_age_s:.1f} s"
    return f"{text}: {_GONE} {_last(who)}"


def _last(who: PeerStatus) -> str:
    return f"it was last seen {'in' if who.place.collective else 'while'} {_where(who)}"


_ALIVE = ("starting", "running", "finishing")


def _hung_outside(seen: Mapping[int, PeerStatus], limits: Limits) -> Diagnosis | None:
    """All are outside of the lockstep, and some wait for a rank that does not get on."""
    if any(each.state not in _ALIVE or each.place.collective for each in seen.values()):
        return None
    waiting = [rank for rank, each in seen.items() if each.place.waits]
    odd = [rank for rank in seen if rank not in waiting]
    if (
        not waiting
        or not odd
        or min(each.progress_age_s for each in seen.values()) < limits.stalled
    ):
        return None
    return Diagnosis(
        tuple(odd), f"{_stand(odd, seen)}, while {_name(waiting)} {_verb(waiting)}: {_HANGS}"
    )


def _stalled(members: Mapping[int, PeerStatus], limits: Limits) -> Diagnosis | None:
    here = {
        rank: each
        for rank, each in members.items()
        if each.state in ("running", "cut") and each.place.collective
    }
    broken = [
        each
        for each in members.values()
        if each.state == "cut" and each.progress_age_s >= limits.cut
    ]
    still = min((each.progress_age_s for each in members.values()), default=0.0)
    if not broken and not (
        still >= limits.stalled
        and all(each.state in _ALIVE for each in members.values())
        and _anybody_waits(here.values())
    ):
        return None
    if here:
        odd = [rank for rank in members if rank not in here] or _out_of_step(here)
    else:  # outside of the lockstep a collective broke: whoever still works was not there
        here = {rank: each for rank, each in members.items() if each.state == "cut"}
        odd = [r for r, each in members.items() if r not in here and not each.place.waits]
    waiting = [rank for rank in here if rank not in odd]
    if not odd or not waiting:
        place = next((each.place for each in here.values()), Progress())
        where = str(place) if place.collective else "outside of the steps"
        what = f"broke: {broken[0].text}" if broken else f"has not ended for {still:.1f} s"
        text = f"a collective of {_name(members)}, at {where}, {what}; all are alive, so look at "
        return Diagnosis((), text + "the network between them")
    place = members[waiting[0]].place
    at = f" at {place}" if place.collective else ""
    return Diagnosis(
        tuple(odd),
        f"{_stand(odd, members)}, while {_name(waiting)} {_verb(waiting)}{at}: {_HANGS}"
        + (", or has skipped a collective" if at else ""),
    )


def _anybody_waits(here: Collection[PeerStatus]) -> bool:
    # On a GPU the host may run ahead of its collectives and wait somewhere else.
    ahead = len({each.place.collective for each in here}) > 1
    return ahead or any(each.place.waits for each in here)


def _out_of_step(here: Mapping[int, PeerStatus]) -> list[int]:
    """The ranks that are not where the others wait for them; none if all are in one place."""
    places = {rank: each.place for rank, each in here.items()}
    if len(set(places.values())) < 2:
        return []
    fewest = min(place.collective for place in places.values())
    behind = [rank for rank, place in places.items() if place.collective == fewest]
    if working := [rank for rank in behind if not places[rank].waits]:
        return working
    common, count = Counter(places.values()).most_common(1)[0]
    if 2 * count > len(places):  # a rank that skipped a collective may be ahead of the others
        return [rank for rank, place in places.items() if place != common]
    return behind


_HANGS = "it hangs there"


def _stand(ranks: Iterable[int], seen: Mapping[int, PeerStatus]) -> str:
    return _several(f"rank {rank} on {seen[rank].host} {_stands(seen[rank])}" for rank in ranks)


def _stands(who: PeerStatus) -> str:
    if who.state == "left":
        return "has left"
    if not who.place.collective and not who.place.step:
        return f"is {who.state}"
    at = "at " if who.place.collective else ""
    return f"has been {at}{who.place} for {who.progress_age_s:.1f} s"


def _verb(ranks: Sequence[int]) -> str:
    return "waits" if len(ranks) == 1 else "wait"


def _name(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    shown = ", ".join(names[:_MOST_SHOWN] + ["..."] * (len(names) > _MOST_SHOWN))
    return f"rank {shown}" if len(names) == 1 else f"ranks {shown}"


def _several(texts: Iterable[str]) -> str:
    every = list(texts)
    more = [f"and {len(every) - _MOST_SHOWN} more"] if len(every) > _MOST_SHOWN else []
    return "; ".join(every[:_MOST_SHOWN] + more)
