"""Work queue of lines that were dealt to the data ranks.

Each rank has a share of the lines, which are contiguous in the table of pending lines, and a
counter in the store. It takes its own lines first. Then it helps the rank with the most left: it
takes a run of that rank's next lines, shorter the fewer are left, so that neighbours, which share
prefixes, stay together and all ranks still end at about the same time. Every line is taken through
its rank's counter, so exactly once.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch.distributed as dist

from engine.batch.input.pending import Line, Lines
from engine.request import Completion, Request


class DealtQueue:
    """The request source of one data rank; ranks take from each other when their own are taken."""

    limit: int  # requests this rank may hold at once: its own lines, or an equal share of all

    def __init__(
        self,
        lines: Lines,
        parse: Callable[[Line], Request | Completion],
        store: dist.Store,
        key: str,
        bounds: list[int],
        data_rank: int,
    ) -> None:
        """Build the queue of one data rank.

        Args:
            lines: what to run, equal on every rank.
            parse: turns a line into a request, or into an error record.
            store: holds the counters.
            key: prefix of the counters' keys; must be unused before this run.
            bounds: queue indices at which each data rank's lines begin, then the number of lines.
            data_rank: this one.
        """
        num_data = len(bounds) - 1
        self._shares = [range(begin, end) for begin, end in pairwise(bounds)]
        self.limit = max(1, len(self._shares[data_rank]), -(-bounds[-1] // num_data))
        self._lines = lines
        self._parse = parse
        self._store = store
        self._key = key
        self._data_rank = data_rank
        self._taken = range(0)  # queue indices of lines of others that are this rank's now
        # At most this many are left of each rank's; exact when the counter was last read.
        self._left = [len(share) for share in self._shares]

    def take(self) -> Request | Completion | None:
        """Return the next request, an error record for a bad line, or None when nothing is left.

        Uses the store: only the first rank of each tensor group must call.
        """
        if not self._taken:
            own = self._data_rank
            if self._left[own]:
                self._taken = self._claim(own, 1)
            while not self._taken and (rank := self._most_left()) is not None:
                num_data = len(self._shares)
                self._taken = self._claim(rank, max(1, self._left[rank] // (4 * num_data)))
        if not self._taken:
            return None
        index, self._taken = self._taken[0], self._taken[1:]
        return self._parse(self._lines[index])

    def is_exhausted(self) -> bool:
        """Return whether all lines have been taken. Takes none."""
        return not self._taken and self._most_left() is None

    def _claim(self, rank: int, count: int) -> range:
        """Take up to `count` lines of a rank; return their queue indices."""
        share = self._shares[rank]
        end = self._store.add(f"{self._key}/{rank}", count)
        self._left[rank] = max(0, len(share) - end)
        return share[end - count : end]

    def _most_left(self) -> int | None:
        """Return the rank with the most lines left, this one included; None where none has any."""
        while (most := max(self._left)) > 0:
            rank = self._left.index(most)
            taken = self._store.add(f"{self._key}/{rank}", 0)
            self._left[rank] = max(0, len(self._shares[rank]) - taken)
            if self._left[rank] == max(self._left) and self._left[rank]:
                return rank
        return None
