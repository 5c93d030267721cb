"""The work queue: ranks take indices of pending lines from one counter in the store.

A rank reads a line only when it takes it; `dealt_queue.py` is for lines that were dealt to ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from engine.batch.input.pending import Line, Lines
from engine.request import Completion, Request


class WorkQueue:
    """The request source of one data rank; all data ranks take from one counter in the store."""

    limit: int  # requests this rank may hold at once, so that few requests spread over all ranks:
    # 8 on 2 ranks go 4 and 4

    def __init__(
        self,
        lines: Lines,
        parse: Callable[[Line], Request | Completion],
        store: dist.Store,
        key: str,
        num_data: int,
    ) -> None:
        """Build the queue of one data rank.

        Args:
            lines: what to run, equal on every rank.
            parse: turns a line into a request, or into an error record.
            store: holds the counter.
            key: the counter's; must be unused before this run.
            num_data: number of data ranks.
        """
        self.limit = max(1, -(-len(lines) // num_data))
        self._lines = lines
        self._parse = parse
        self._store = store
        self._key = key
        self._exhausted = False

    def take(self) -> Request | Completion | None:
        """Return the next request, an error record for a bad line, or None when nothing is left.

        Uses the store: only the first rank of each tensor group must call.
        """
        if self._exhausted:
            return None
        queue_index = self._store.add(self._key, 1) - 1
        if queue_index >= len(self._lines):
            self._exhausted = True
            return None
        return self._parse(self._lines[queue_index])

    def is_exhausted(self) -> bool:
        """Return whether all lines have been taken. Takes none."""
        return self._exhausted or self._store.add(self._key, 0) >= len(self._lines)
