"""Late loads: counts that a GPU made in a step, read on the host when the next one has ended.

The host would wait for the device to read them at once, and what a CUDA graph counts it counts
again in every replay. So a step's counts are copied out at its end, by one copy for all layers that
nobody waits for, and read at the end of the next step, whose tokens the host has read since. Where
it has read none, as on a rank without a sequence, it waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

Record = Callable[[np.ndarray], None]  # takes the counts of one call


class LateLoads:
    """The counts of one engine that the host has not read yet."""

    def __init__(self) -> None:
        self._calls: list[tuple[torch.Tensor, Record]] = []  # of this step
        self._copied: tuple[torch.Tensor, Sequence[tuple[int, Record]]] | None = None

    def add(self, counts_N: torch.Tensor, record: Record) -> None:
        """Keep the counts of one call, int64 on a device, until the step ends.

        record: called with them, in the order of the calls.
        """
        self._calls.append((counts_N, record))

    def take(self) -> list[tuple[torch.Tensor, Record]]:
        """Return the counts of this step and forget them: a graph's, added again by each replay."""
        calls, self._calls = self._calls, []
        return calls

    def end_step(self, *, wait: bool = False, waited: bool = True) -> None:
        """Record the counts of the step before; copy those of this step out.

        Args:
            wait: record those of this step too.
            waited: whether the host has waited for what this step computed.
        """
        if self._copied is not None:
            if not waited:
                # SYNC: on a rank that has read no tokens in this step, while others do.
                torch.cuda.synchronize()
            self._read()
        if self._calls:
            counts_M = torch.cat([counts for counts, _ in self._calls])
            host_M = torch.empty(counts_M.shape, dtype=counts_M.dtype, pin_memory=True)
            host_M.copy_(counts_M, non_blocking=True)
            self._copied = host_M, [(len(counts), record) for counts, record in self._calls]
            self._calls = []
        if wait:
            self.flush()

    def flush(self) -> None:
        """Record all counts that were copied out."""
        if self._copied is not None:
            # SYNC: at the end of a run, and where loads of single steps are recorded.
            torch.cuda.synchronize()
            self._read()

    def clear(self) -> None:
        """Forget all counts."""
        self._calls, self._copied = [], None

    def _read(self) -> None:
        assert self._copied is not None
        (host_M, calls), self._copied = self._copied, None
        parts = host_M.numpy().copy()
        for size, record in calls:
            record(parts[:size])
            parts = parts[size:]
