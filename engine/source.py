"""Where requests come from: the protocol between the generation loop and whoever feeds it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
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

    def is_dry(self) -> bool:
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

    def is_dry(self) -> bool:
        """Whether nothing is left to take."""
        return not self._remaining
