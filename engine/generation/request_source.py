"""Request source and sink: the protocol by which requests enter the generation loop and completions
leave it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from engine.request import Completion, Request

Sink = Callable[[list[Completion]], None]  # takes the completions of one step


class RequestSource(Protocol):
    """A queue of requests as one data rank sees it."""

    limit: int  # at most this many requests may be in flight on this rank

    def take(self) -> Request | Completion | None:
        """Return the next request of this rank, None when none is left.

        A `Completion` is a request that failed before it could run; it is passed on to the sink.
        """
        ...

    def is_exhausted(self) -> bool:
        """Return whether no request is left; removes none."""
        ...


class ListSource:
    """A source over a fixed list of requests, for this rank alone."""

    def __init__(self, requests: Iterable[Request | Completion], limit: int = 1 << 30) -> None:
        self.limit = limit
        self._remaining = deque(requests)

    def take(self) -> Request | Completion | None:
        """Return the next request, None when none is left."""
        return self._remaining.popleft() if self._remaining else None

    def is_exhausted(self) -> bool:
        """Return whether no request is left."""
        return not self._remaining


def partition(requests: Sequence[Request], num_ranks: int) -> list[list[Request]]:
    """Return each data rank's requests, with about the same number of tokens per rank.

    Greedy, longest request first: each goes to the rank with the fewest tokens so far, the lowest
    of equals. A rank's requests keep their order. A request counts its prompt and max_new_tokens.

    Worked example, prompts of 5, 1, 1 and 4 tokens and no new ones on 2 ranks: rank 0 gets the
    first and the third, rank 1 the others.
    """
    indices: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    tokens = [
        sum(len(each.prompt_token_ids) + each.params.max_new_tokens for each in request.choices)
        for request in requests
    ]
    for index in sorted(range(len(requests)), key=lambda index: -tokens[index]):
        rank = loads.index(min(loads))
        indices[rank].append(index)
        loads[rank] += tokens[index]
    return [[requests[index] for index in sorted(own)] for own in indices]
