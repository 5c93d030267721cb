"""Replan worker: one rank of an engine whose copies may change as it runs, timed step by step.

Started as every candidate of a bench, see `bench/candidate.py`.
"""

from __future__ import annotations

import time
from typing import Any

from bench.protocol import serve

from capacity.balance_worker import Worker


class ReplanWorker(Worker):
    """A balance worker that runs a job with or without `moe.copies.replan`."""

    def measure(self, placement: str, replan: str, job: str) -> dict[str, Any]:
        """Run a job on a new engine. Collective.

        Args:
            placement: a file.
            replan: `moe.copies.replan`.
            job: its name.

        Returns `after`, rows of this rank [S][L]; `before`, of every expert [S][L][E], on rank 0;
        `seconds` of each step; and `moves`, copies that had changed before each step, on rank 0.
        """
        settings, self._settings = self._settings, [*self._settings, f"moe.copies.replan={replan}"]
        try:
            self.place(placement)
        finally:
            self._settings = settings
        changes: list[int] = []
        ends: list[float] = []
        moves: list[int] = []
        self._llm.on_replan = lambda change: changes.append(len(change["moves"]))
        run = self._llm.run

        def timed_run(source: Any, sink: Any, on_step: Any) -> None:
            def after_step(report: Any) -> None:
                ends.append(time.monotonic())
                moves.append(sum(changes))
                on_step(report)

            ends.append(time.monotonic())
            run(source, sink, on_step=after_step)

        self._llm.run = timed_run
        reply = self.run(job)
        seconds = [end - begin for begin, end in zip(ends, ends[1:], strict=False)]
        kept = {key: reply[key] for key in ("after", "before", "prefill") if key in reply}
        return {**kept, "seconds": seconds, "moves": moves}


if __name__ == "__main__":
    serve(ReplanWorker())
