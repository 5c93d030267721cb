"""Where requests come from: the protocol between the generation loop and whoever feeds it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from engine.request import Completion, Request


class RequestSource(Protocol):
    """A queue of requests as one data rank sees it.

    limit: at most this many requests may be in flight on this rank.
    """

    limit: int

    def take(self) -> Request | Completion | None:
        """Return the next request of this rank, None when none is left.

        A `Completion` stands for a request that failed before it could run; it goes straight to the
        sink.
        """
        ...

    def is_exhausted(self) -> bool:
        """Whether nothing is left to take. Takes nothing."""
        ...


class ListSource:
    """Requests that are all at hand, on this rank alone."""

    def __init__(self, requests: Iterable[Request | Completion], limit: int = 1 << 30) -> None:
        self.limit = limit
        self._remaining = deque(requests)

    def take(self) -> Request | Completion | None:
        """Return the next request, None when none is left."""
        return self._remaining.popleft() if self._remaining else None

    def is_exhausted(self) -> bool:
        """Whether nothing is left to take."""
        return not self._remaining


def deal(requests: Sequence[Request], num_ranks: int) -> list[list[Request]]:
    """Share requests out so that every data rank has about as many tokens to run: the longest
    first, each to the rank with the fewest tokens so far, the first of equals. A rank keeps the
    order of the requests.

    A request counts its prompt and the new tokens it may ask for. Worked example, prompts of 5, 1,
    1 and 4 tokens and no new ones on 2 ranks: rank 0 gets the first and the third, rank 1 the
    others.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    tokens = [len(each.prompt_token_ids) + each.params.max_new_tokens for each in requests]
    for place in sorted(range(len(requests)), key=lambda place: -tokens[place]):
        rank = loads.index(min(loads))
        shares[rank].append(place)
        loads[rank] += tokens[place]
    return [[requests[place] for place in sorted(share)] for share in shares]


Sink = Callable[[list[Completion]], None]
