"""DeepSpeed's comms logger, fed with the collectives that the phase clock recorded.

`profiler.deepspeed_comms: true`. The engine calls torch.distributed and times its collectives
itself, so `deepspeed.comm` records none of them. Here every span that waits for a collective
becomes an entry of DeepSpeed's own logger, with operation, latency and message size, and
DeepSpeed's figures become a table of the report. A latency is the time from a rank's start of the
collective to the end of its wait, stragglers and overlapped work included. A message is what a rank
sends: in an all-to-all its rows for other ranks, in an all-gather its part. Bandwidths follow
DeepSpeed's formulas, which assume the group is the whole world. A tensor group's collectives are
mostly all-reduces, and all are logged as such.

Message sizes of an all-to-all differ from call to call, so the table has one line for all sizes
from one power of two to the next: a message of 1,500 bytes counts in the line of 2,048.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from engine.profiling.phase_clock import Phase, Spans

# DeepSpeed's name of the collective that a phase waits for. An agreement of several rounds is one.
_OPERATIONS = {
    Phase.CONSENSUS: "all_gather",
    Phase.DISPATCH: "all_to_all_single",
    Phase.COMBINE: "all_to_all_single",
    Phase.CONTROL: "all_gather",
    Phase.TENSOR: "all_reduce",
}
_AVERAGES = ("avg_latency_ms", "tput_avg_gbps", "busbw_avg_gbps")
# The logger stores each entry; after this many they are summed.
_BATCH = 4096


@dataclass(frozen=True, slots=True)
class CommsRow:
    """Calls of one operation with messages of at most `message_bytes` and more than half of that.

    The averages are DeepSpeed's, without outliers.
    """

    message_bytes: int
    count: int
    bytes: int  # of all messages
    total_latency_ms: float
    avg_latency_ms: float
    tput_avg_gbps: float
    busbw_avg_gbps: float


# Operation and phase -> its rows, small messages first.
CommsTable = dict[str, list[CommsRow]]


class Logger(Protocol):
    """What is used of DeepSpeed's `CommsLogger`."""

    def append(self, raw_name: str, record_name: str, latency: float, msg_size: int) -> None:
        """Add an entry; milliseconds and bytes."""

    def log_all(self, print_log: bool, *, return_dict: bool) -> dict[str, Any] | None:
        """Return the figures of all entries if `return_dict`."""

    def reset_data(self) -> None:
        """Delete all entries."""


class DeepSpeedComms:
    """Logs one rank's run with DeepSpeed's logger.

    Args:
        group_size: of the lockstep group, 2 or more.
    """

    def __init__(self, logger: Logger, group_size: int) -> None:
        self._logger = logger
        self._peers = group_size - 1
        self._num_entries = 0
        # name -> bound -> float64 [6]: count, bytes, latency, and the three averages times count
        self._sums: dict[str, dict[int, np.ndarray]] = {}
        logger.reset_data()

    def add(self, spans: Spans) -> None:
        """Log the collectives of one step."""
        for index in np.flatnonzero(spans.collectives >= 0).tolist():
            began = int(spans.arrivals[spans.collectives[index]])
            if began < 0:  # its tensor group skipped it
                continue
            phase, sent = Phase(spans.phases[index]), int(spans.num_bytes[index])
            operation = _OPERATIONS[phase]
            size = sent // self._peers if operation == "all_gather" else sent
            nanoseconds = max(1, int(spans.ends[index] - began))  # DeepSpeed divides by it
            name = f"{operation} ({phase.name.lower()})"
            self._logger.append(operation, name, nanoseconds * 1e-6, size)
            self._num_entries += 1
        if self._num_entries >= _BATCH:
            self._sum_entries()

    def table(self) -> CommsTable:
        """Return what was logged so far."""
        self._sum_entries()
        return {
            name: [_row(bound, sums) for bound, sums in sorted(rows.items())]
            for name, rows in self._sums.items()
        }

    def close(self) -> None:
        """Delete the entries of DeepSpeed's logger."""
        self._logger.reset_data()

    def _sum_entries(self) -> None:
        figures = self._logger.log_all(print_log=False, return_dict=True)
        assert figures is not None
        for name, by_size in figures["summary"].items():
            for size, row in by_size.items():
                count = row["count"]
                bound = 1 << (size - 1).bit_length() if size else 0
                values = [size] + [row[key] for key in _AVERAGES]
                bytes_, *averages = (value * count for value in values)
                sums = self._sums.setdefault(name, {}).setdefault(bound, np.zeros(6))
                sums += (count, bytes_, row["total_latency_ms"], *averages)
        self._logger.reset_data()
        self._num_entries = 0


def _row(bound: int, sums: np.ndarray) -> CommsRow:
    count, num_bytes, latency, *averages = sums.tolist()
    return CommsRow(
        bound, int(count), int(num_bytes), latency, *(average / count for average in averages)
    )


def open_deepspeed_comms(device_type: str, group_size: int) -> DeepSpeedComms | None:
    """Switch DeepSpeed's logger on; return None for a group of one, which has no collectives.

    torch.distributed must be initialised. device_type: cpu or cuda.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    if group_size == 1:
        return None
    os.environ.setdefault("DS_ACCELERATOR", device_type)  # or it warns that it found no GPU
    import deepspeed
    import deepspeed.comm

    # DeepSpeed would compile its shared-memory collectives, for minutes; they are not used.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():  # its logger needs the world's size
        deepspeed.comm.init_distributed(verbose=False)
    deepspeed.comm.configure(enabled=True, prof_all=True)
    return DeepSpeedComms(deepspeed.comm.comm.comms_logger, group_size)
