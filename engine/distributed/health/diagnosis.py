"""Fault diagnosis: from what one rank knows of its peers to the ranks at fault. Pure functions.

`heartbeat.py` exchanges heartbeats, `peer_monitor.py` measures their ages on the observer's clock.
In order of certainty, a rank at fault is

    failed        it has published its error
    unreachable   it publishes no heartbeats: killed, stopped, or its host unreachable
    stalled       it is alive, but no rank makes progress and some wait for it: in a collective or,
                  outside of the lockstep, for its part of the work

When a collective fails while all ranks are alive, the rank at fault is found as in a stall, sooner.

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
    """What an observer knows of a rank."""

    host: str
    state: State
    progress: Progress
    heartbeat_age_s: float  # since its last heartbeat
    progress_age_s: float  # since its state or progress changed
    error: str = ""  # what it failed with


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits of a diagnosis, in seconds."""

    period_s: float  # between two heartbeats of a rank
    heartbeat_timeout_s: float  # heartbeat age at which a rank is declared dead
    # The same once a collective has failed, as it probably failed because a rank died. Also from a
    # rank's error to its diagnosis: mostly the others exit because of it by themselves.
    short_timeout_s: float
    collective_timeout_s: float  # from a failed collective to a diagnosis, where no rank is dead
    stall_timeout_s: float  # time without progress of any rank

    @classmethod
    def of(cls, timeout_s: float, world_size: int = 1) -> Limits:
        """Return limits well within `timeout_s`, if that is 2 s or more.

        The survivors have to agree on a diagnosis and to exit, on hosts that may be busy. With more
        than 256 ranks the period is longer: in each one the store sends every rank's heartbeat to
        every rank, and its one thread manages about half a million per second.
        """
        period_s = min(max(timeout_s / 40, 0.1), 0.5) * max(1.0, world_size / 256) ** 2
        long_s = max(1.0, min(timeout_s / 2, 10.0), 4 * period_s)
        short_s = min(long_s, max(1.0, 4 * period_s))
        return cls(period_s, long_s, short_s, short_s + 4 * period_s, 0.6 * timeout_s)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A fault and the ranks that caused it."""

    ranks: tuple[int, ...]  # empty where no rank is at fault
    text: str
    unreachable: bool = False  # the ranks have stopped publishing, so they may not know of it

    def report(self, peers: Mapping[int, PeerStatus]) -> str:
        """Return the report to print: the fault, then the progress of every rank."""
        lines = [f"fault: {self.text}"]
        for rank in sorted(peers)[:_MOST_SHOWN]:
            each = peers[rank]
            lines.append(f"  rank {rank} on {each.host}: {_format_activity(each)}")
        if len(peers) > _MOST_SHOWN:
            lines.append(f"  and {len(peers) - _MOST_SHOWN} more ranks")
        return "\n".join(lines)


def diagnose(
    peers: Mapping[int, PeerStatus], own: int, group: Iterable[int], limits: Limits
) -> Diagnosis | None:
    """Return the diagnosis of rank `own`, None while nothing is wrong.

    Args:
        peers: every rank, `own` included.
        group: the ranks in lockstep with `own`; only these can stall each other, but the loss of
            any rank ends the run.
    """
    collective_failed = any(each.state == "collective_failed" for each in peers.values())
    others = {rank: each for rank, each in peers.items() if rank != own}
    failed = [
        (each.progress_age_s, -rank)
        for rank, each in others.items()
        if each.state == "failed"
        and (collective_failed or each.progress_age_s >= limits.short_timeout_s)
    ]
    if failed:
        first = -max(failed)[1]  # the others may have failed because of it
        return _failed(first, peers[first])
    timeout_s = limits.short_timeout_s if collective_failed else limits.heartbeat_timeout_s
    dead = [
        rank
        for rank, each in others.items()
        if each.state not in ("failed", "exited") and each.heartbeat_age_s >= timeout_s
    ]
    if dead:
        text = _join(_format_unreachable(rank, peers[rank]) for rank in dead)
        return Diagnosis(tuple(dead), text, unreachable=True)
    return _hung_outside(peers, limits) or _stalled({rank: peers[rank] for rank in group}, limits)


def diagnose_store(
    store_rank: int | None, peers: Mapping[int, PeerStatus], silence_s: float
) -> Diagnosis:
    """Return the diagnosis when the store has not answered for `silence_s` seconds.

    store_rank: the rank whose process holds the store, None where the launcher does.
    """
    waited = f"has not answered for {silence_s:.1f} s"
    if store_rank is None:
        return Diagnosis((), f"the launcher's store {waited}: look for its own error")
    peer = peers[store_rank]
    if peer.state == "failed":
        return _failed(store_rank, peer)
    text = f"rank {store_rank} on {peer.host}, which holds the store, {waited}"
    text = f"{text}: {_UNREACHABLE} {_format_last_seen(peer)}"
    return Diagnosis((store_rank,), text, unreachable=True)


def _format_activity(peer: PeerStatus) -> str:
    """Return the progress in the lockstep, otherwise what the rank does, otherwise its state."""
    progress = peer.progress
    if progress.collective or (progress.step and peer.state not in ("exited", "failed")):
        return str(progress)
    return "in a failed collective" if peer.state == "collective_failed" else peer.state


_UNREACHABLE = "killed, stopped or unreachable;"


def _failed(rank: int, peer: PeerStatus) -> Diagnosis:
    where = f" in {peer.progress}" if peer.progress.collective else ""
    return Diagnosis((rank,), f"rank {rank} on {peer.host} failed{where}: {peer.error}")


def _format_unreachable(rank: int, peer: PeerStatus) -> str:
    text = f"rank {rank} on {peer.host} has published no heartbeat for {peer.heartbeat_age_s:.1f} s"
    return f"{text}: {_UNREACHABLE} {_format_last_seen(peer)}"


def _format_last_seen(peer: PeerStatus) -> str:
    in_or_while = "in" if peer.progress.collective else "while"
    return f"it was last seen {in_or_while} {_format_activity(peer)}"


_ALIVE = ("starting", "running", "finishing")


def _hung_outside(peers: Mapping[int, PeerStatus], limits: Limits) -> Diagnosis | None:
    """Return the stall outside of the lockstep: some ranks wait, the others do not advance."""
    if any(each.state not in _ALIVE or each.progress.collective for each in peers.values()):
        return None
    waiting = [rank for rank, each in peers.items() if each.progress.is_waiting]
    busy = [rank for rank in peers if rank not in waiting]
    if not waiting or not busy or _stall_s(peers) < limits.stall_timeout_s:
        return None
    text = f"{_format_progress(busy, peers)}, while {_format_waiting(waiting)}: {_HANGS}"
    return Diagnosis(tuple(busy), text)


def _stalled(members: Mapping[int, PeerStatus], limits: Limits) -> Diagnosis | None:
    """Return the stall or failed collective of a lockstep group; the ranks are all alive."""
    present = {
        rank: each
        for rank, each in members.items()
        if each.state in ("running", "collective_failed") and each.progress.collective
    }
    errors = [
        each.error
        for each in members.values()
        if each.state == "collective_failed" and each.progress_age_s >= limits.collective_timeout_s
    ]
    stall_s = _stall_s(members)
    if not errors and not (
        stall_s >= limits.stall_timeout_s
        and all(each.state in _ALIVE for each in members.values())
        and _any_waiting(present.values())
    ):
        return None
    if present:
        absent = [rank for rank in members if rank not in present] or _out_of_step(present)
    else:  # the collective failed outside of the lockstep: a rank that still works was not in it
        present = {r: each for r, each in members.items() if each.state == "collective_failed"}
        absent = [
            r for r, each in members.items() if r not in present and not each.progress.is_waiting
        ]
    waiting = [rank for rank in present if rank not in absent]
    if not absent or not waiting:
        progress = next((each.progress for each in present.values()), Progress())
        where = str(progress) if progress.collective else "outside of the steps"
        what = f"failed: {errors[0]}" if errors else f"has not completed for {stall_s:.1f} s"
        text = f"a collective of {_format_ranks(members)}, at {where}, {what}; all are alive, so "
        return Diagnosis((), text + "check the network between them")
    progress = members[waiting[0]].progress
    at = f" at {progress}" if progress.collective else ""
    return Diagnosis(
        tuple(absent),
        f"{_format_progress(absent, members)}, while {_format_waiting(waiting)}{at}: {_HANGS}"
        + (", or has skipped a collective" if at else ""),
    )


def _stall_s(peers: Mapping[int, PeerStatus]) -> float:
    """Return for how long no rank has made progress."""
    return min((each.progress_age_s for each in peers.values()), default=0.0)


def _any_waiting(present: Collection[PeerStatus]) -> bool:
    # On a GPU the host may run ahead of its collectives and wait somewhere else.
    ahead = len({each.progress.collective for each in present}) > 1
    return ahead or any(each.progress.is_waiting for each in present)


def _out_of_step(present: Mapping[int, PeerStatus]) -> list[int]:
    """Return the ranks that are not where the others wait for them; none if all are there."""
    progress_of = {rank: each.progress for rank, each in present.items()}
    if len(set(progress_of.values())) < 2:
        return []
    fewest = min(progress.collective for progress in progress_of.values())
    behind = [rank for rank, progress in progress_of.items() if progress.collective == fewest]
    if working := [rank for rank in behind if not progress_of[rank].is_waiting]:
        return working
    common, count = Counter(progress_of.values()).most_common(1)[0]
    if 2 * count > len(progress_of):  # a rank that skipped a collective may be ahead of the others
        return [rank for rank, progress in progress_of.items() if progress != common]
    return behind


_HANGS = "it hangs there"


def _format_progress(ranks: Iterable[int], peers: Mapping[int, PeerStatus]) -> str:
    return _join(f"rank {r} on {peers[r].host} {_format_clause(peers[r])}" for r in ranks)


def _format_clause(peer: PeerStatus) -> str:
    if peer.state == "exited":
        return "has exited"
    if not peer.progress.collective and not peer.progress.step:
        return f"is {peer.state}"
    at = "at " if peer.progress.collective else ""
    return f"has been {at}{peer.progress} for {peer.progress_age_s:.1f} s"


def _format_waiting(ranks: Sequence[int]) -> str:
    return f"{_format_ranks(ranks)} {'waits' if len(ranks) == 1 else 'wait'}"


def _format_ranks(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    shown = ", ".join(names[:_MOST_SHOWN] + ["..."] * (len(names) > _MOST_SHOWN))
    return f"rank {shown}" if len(names) == 1 else f"ranks {shown}"


def _join(texts: Iterable[str]) -> str:
    every = list(texts)
    more = [f"and {len(every) - _MOST_SHOWN} more"] if len(every) > _MOST_SHOWN else []
    return "; ".join(every[:_MOST_SHOWN] + more)
