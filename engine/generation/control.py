"""Control words: what the ranks of a lockstep group tell each other before every step.

One small all-gather on the host-side group. It decides whether there is a step at all: ranks
without work run it with zero tokens as long as one rank has some, and all leave the loop together.
The arrival stamps of an earlier step ride along (see `profiling/waiting.py`). The vector's length
is fixed by the model, never by what a rank has to say.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from operator import attrgetter

import numpy as np
import torch

from engine.distributed.clock import ClockOffset, ClockTracker
from engine.distributed.collectives import all_gather_rows
from engine.distributed.groups import Group
from engine.profiling.phase_clock import NONE, Spans


@dataclass(frozen=True, slots=True)
class ControlMessage:
    """One rank's view before a step: tokens it is about to run, its requests, whether its queue
    has run dry, how many of the tokens compete for expert capacity, the signal that asked it to
    stop (0: none), whether running requests may not even finish first, its experts' time a row
    (picoseconds, 0: unknown), and how many of the tokens are read in the end.
    """

    tokens_prefill: int
    tokens_decode: int
    running: int
    waiting: int
    finished: int
    exhausted: bool
    competing: int = 0
    signal: int = 0
    stop_now: bool = False
    pace: int = 0
    tokens_read: int = 0


_NUM_WORDS = 11


class ControlPlane:
    """Exchanges control words over one group.

    num_stamps: collectives of a step that have stamps; those that a step has beyond have none.
    num_layers: MoE layers, whose row counts of the step before ride along.
    """

    def __init__(self, group: Group, num_stamps: int, num_layers: int, offset: ClockOffset) -> None:
        self._group = group
        self._num_layers = num_layers
        self.num_stamps = num_stamps
        self._clock = ClockTracker(offset, group.rank)
        self._left = -1  # when this rank left the last exchange, by its own clock

    def exchange(
        self, words: ControlMessage, rows: list[int], spans: Spans | None, spans_step: int
    ) -> tuple[list[ControlMessage], np.ndarray | None, np.ndarray | None]:
        """Return every rank's words, every rank's `rows` [W, L], and the arrivals [W, C] of step
        `spans_step` where every rank sent that step.

        rows: what this rank's experts worked on in each MoE layer of the step before, [] when there
        was none; then None is returned for it. spans: an earlier step's spans on this rank, or
        None. Arrivals are in this rank's own nanoseconds, negative where a rank has none.
        Collective over the control group: every rank must call.
        """
        offset = self._clock.nanoseconds
        last = _NUM_WORDS + 2 + self.num_stamps
        vector = np.full(last + self._num_layers, -1, dtype=np.int64)
        vector[:_NUM_WORDS] = _values(words)
        if rows:
            vector[last:] = rows
        vector[_NUM_WORDS + 1] = self._left
        if spans is not None:
            stamps = spans.arrivals[: self.num_stamps]
            vector[_NUM_WORDS] = spans_step
            vector[_NUM_WORDS + 2 :][: len(stamps)] = _moved(stamps, offset)
        gathered = all_gather_rows(torch.from_numpy(vector)[None], self._group).numpy()
        self._left = time.monotonic_ns()
        self._clock.note(gathered[:, _NUM_WORDS + 1])
        everyone = [_words(row) for row in gathered[:, :_NUM_WORDS].tolist()]
        rows_WL = gathered[:, last:] if rows else None
        if spans is None or (gathered[:, _NUM_WORDS] != spans_step).any():
            return everyone, rows_WL, None
        arrivals = gathered[:, _NUM_WORDS + 2 : last][:, : len(spans.arrivals)]
        return everyone, rows_WL, _moved(arrivals, -offset)

    @property
    def clock_offset(self) -> int:
        """Nanoseconds to add to this rank's stamps to get those of the group's first rank."""
        return self._clock.nanoseconds

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank sends in an exchange."""
        return 8 * (_NUM_WORDS + 2 + self.num_stamps + self._num_layers) * (self._group.size - 1)


_values = attrgetter(*(each.name for each in fields(ControlMessage)))


def _words(row: list[int]) -> ControlMessage:
    prefill, decode, running, waiting, finished, exhausted, competing, signal, now, pace, read = row
    return ControlMessage(
        prefill,
        decode,
        running,
        waiting,
        finished,
        bool(exhausted),
        competing,
        signal,
        bool(now),
        pace,
        read,
    )


def _moved(stamps: np.ndarray, offset: int) -> np.ndarray:
    """Stamps by another clock; what is no stamp stays."""
    return np.where(stamps < 0, NONE, stamps + offset)
