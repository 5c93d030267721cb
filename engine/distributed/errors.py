"""One rank's mistake becomes everybody's error, so that a run fails and never hangs.

Called wherever a rank may find a fault alone (its config, its files, its GPU) before the next
collective that the others would enter without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.distributed.collectives import gather_objects
from engine.distributed.groups import Group


class RankError(ValueError):
    """An error found by some ranks and raised, with the same text, by all."""


class UnreportedError(ValueError):
    """An error of this rank that it could not tell the others: whoever has one tells the user."""


class RendezvousError(RuntimeError):
    """Ranks did not meet: raised by those that came, each for itself."""

    exit_code = 1


def raise_on_any_rank(
    group: Group, error: str | None, exception: type[ValueError] = RankError
) -> None:
    """Raise `exception` on every rank when any rank passes an error; return None otherwise.

    Collective over `group`: every rank must call.
    """
    errors = dict(zip(group.ranks, gather_objects(error, group), strict=True))
    if found := {rank: text for rank, text in errors.items() if text is not None}:
        raise exception(merge_errors(found, group.size))


def merge_errors(
    errors: Mapping[int, str], num_ranks: int, hosts: Sequence[str] | None = None
) -> str:
    """One text from the errors of global ranks: each distinct error once, after who has it.

    hosts: of all ranks by rank, to be named too.
    """
    ranks_of: dict[str, list[int]] = {}
    for rank, text in sorted(errors.items()):
        ranks_of.setdefault(text, []).append(rank)
    if len(errors) == num_ranks and len(ranks_of) == 1:
        return next(iter(ranks_of))

    def who(ranks: Sequence[int]) -> str:
        if hosts is None:
            return name_ranks(ranks)
        names = list(dict.fromkeys(hosts[rank] for rank in ranks))
        more = f", ... ({len(names)})" if len(names) > 4 else ""
        return f"{name_ranks(ranks)} on {', '.join(names[:4])}{more}"

    return "\n".join(f"{who(ranks)}: {text}" for text, ranks in ranks_of.items())


def name_ranks(ranks: Sequence[int]) -> str:
    """Ranks in words, at most eight of them: `rank 3`, `ranks 0, 2`, `ranks 0, 1, ... (64)`."""
    shown = ", ".join(map(str, ranks[:8])) + (f", ... ({len(ranks)})" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
