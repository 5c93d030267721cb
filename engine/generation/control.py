"""Step control message: what the ranks of a lockstep group exchange before every step.

One small all-gather on the host-side group. It decides whether there is a step at all: ranks
without work run it with zero tokens as long as one rank has some, and all leave the loop together.
The same vector carries the arrival stamps of an earlier step (see `profiling/wait_time.py`). Its
length depends on the model alone, never on a rank's load.

Layout of a rank's vector, int64, F fields of the message, C stamps, L MoE layers:

    [0, F)         ControlMessage, in the order of its fields
    F              step of the stamps, -1 without stamps
    F + 1          when this rank left the last exchange, nanoseconds of its own clock
    [F + 2, + C)   arrival stamps, by the clock of the group's first rank
    [.., + L)      rows that this rank's experts processed per MoE layer in the step before

Legend: W ranks, C collectives with a stamp per step, L MoE layers.
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
    """One rank's state before a step; sent as one int64 per field."""

    tokens_prefill: int  # of the step about to run, as all tokens_... below
    tokens_decode: int
    running: int  # requests
    waiting: int  # requests
    finished: int  # requests since the run began
    exhausted: bool  # the rank's request source has none left
    tokens_eligible: int = 0  # tokens subject to expert capacity
    signal: int = 0  # number of the signal that asks this rank to stop; 0: none
    stop_now: bool = False  # stop without finishing the running requests
    time_per_row: int = 0  # of this rank's experts, picoseconds; 0: unknown
    tokens_read: int = 0  # tokens whose final hidden state is read
    replan: int = 0  # what this rank has ready for a change of copies (`replanner.py`)
    graph_bucket: int = 0  # of the CUDA graph that could run the step here (`graphs/`); 0: none


_NUM_FIELDS = len(fields(ControlMessage))


class ControlPlane:
    """Exchanges control messages over one group."""

    def __init__(self, group: Group, num_stamps: int, num_layers: int, offset: ClockOffset) -> None:
        """Build this rank's end.

        Args:
            num_stamps: C; collectives of a step beyond these have no stamp.
            num_layers: L.
        """
        self._group = group
        self._num_layers = num_layers
        self.num_stamps = num_stamps
        self._clock = ClockTracker(offset, group.rank)
        self._exchanged_at = -1  # end of the last exchange, nanoseconds of its own clock

    def exchange(
        self, message: ControlMessage, rows: list[int], spans: Spans | None, spans_step: int
    ) -> tuple[list[ControlMessage], np.ndarray | None, np.ndarray | None]:
        """Send this rank's message; return all ranks' messages, rows and arrivals.

        Args:
            rows: rows that this rank's experts processed in each MoE layer of the step before; []
                when there was none.
            spans: an earlier step's spans on this rank, or None.
            spans_step: the number of that step.

        Returns the messages in rank order; the rows, int64 [W, L], None without `rows`; and the
        arrivals of step `spans_step`, int64 [W, C] in nanoseconds of this rank's clock, negative
        where a rank has none, None unless every rank sent that step.

        Collective over the control group: every rank must call.
        """
        offset = self._clock.nanoseconds
        last = _NUM_FIELDS + 2 + self.num_stamps
        vector = np.full(last + self._num_layers, -1, dtype=np.int64)
        vector[:_NUM_FIELDS] = _values(message)
        if rows:
            vector[last:] = rows
        vector[_NUM_FIELDS + 1] = self._exchanged_at
        if spans is not None:
            stamps = spans.arrivals[: self.num_stamps]
            vector[_NUM_FIELDS] = spans_step
            vector[_NUM_FIELDS + 2 :][: len(stamps)] = _shifted(stamps, offset)
        gathered = all_gather_rows(torch.from_numpy(vector)[None], self._group).numpy()
        self._exchanged_at = time.monotonic_ns()
        self._clock.note(gathered[:, _NUM_FIELDS + 1])
        messages = [_message(row) for row in gathered[:, :_NUM_FIELDS].tolist()]
        rows_WL = gathered[:, last:] if rows else None
        if spans is None or (gathered[:, _NUM_FIELDS] != spans_step).any():
            return messages, rows_WL, None
        arrivals = gathered[:, _NUM_FIELDS + 2 : last][:, : len(spans.arrivals)]
        return messages, rows_WL, _shifted(arrivals, -offset)

    @property
    def clock_offset(self) -> int:
        """Nanoseconds to add to this rank's stamps to have them by the clock of the first rank."""
        return self._clock.nanoseconds

    @property
    def num_bytes(self) -> int:
        """Bytes that this rank sends per exchange."""
        return 8 * (_NUM_FIELDS + 2 + self.num_stamps + self._num_layers) * (self._group.size - 1)


_values = attrgetter(*(each.name for each in fields(ControlMessage)))


def _message(row: list[int]) -> ControlMessage:
    prefill, decode, running, waiting, finished, done, eligible, signal, now, *rest = row
    return ControlMessage(
        prefill, decode, running, waiting, finished, bool(done), eligible, signal, bool(now), *rest
    )


def _shifted(stamps: np.ndarray, offset: int) -> np.ndarray:
    """Return the stamps shifted by `offset` nanoseconds; negative ones become `NONE`."""
    return np.where(stamps < 0, NONE, stamps + offset)
