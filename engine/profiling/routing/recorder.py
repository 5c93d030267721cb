"""Routing recorder: passes each step's loads and claims to this rank's trace files.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.profiling.loads import StepLoads
from engine.profiling.report import RoutingReport, StepReport
from engine.profiling.routing.claim_log import ClaimLog, LayerClaims, join_claims
from engine.profiling.routing.trace_file import (
    NUM_COLUMNS,
    TraceHeader,
)
from engine.profiling.routing.writer import TraceEnd, TraceWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderGroup:
    """The expert-parallel group whose steps are recorded."""

    first_rank: int
    num_ranks: int


class RoutingRecorder:
    """Records one run of an engine, one segment of the trace.

    Args:
        folder: existing, of the trace.
        end: of what is in the folder, the same on all ranks.
        loads: writer of this group's loads, on its first rank.
        claims: writer of this rank's claims, where they are recorded.
    """

    def __init__(
        self,
        folder: Path,
        header: TraceHeader,
        group: RecorderGroup,
        end: TraceEnd,
        loads: TraceWriter | None,
        claims: TraceWriter | None,
    ) -> None:
        self._folder, self._header, self._group = folder, header, group
        self._loads, self._claims = loads, claims
        self._segment, self._index = end.segment + 1, end.next_index
        self._log: ClaimLog | None = None

    def start(self, log: ClaimLog) -> None:
        """Have the layers log the claims of the first step, where claims are recorded."""
        self._log = log
        self._choose()

    def add(self, report: StepReport, loads: StepLoads) -> None:
        """Record the step that has ended, if a layer ran in it."""
        if not loads:
            return
        index, group = self._index, self._group
        if self._loads is not None and self._loads.keeps(index):
            tokens = report.tokens_prefill, report.tokens_decode
            columns = (self._segment, index, report.step, *tokens, group.num_ranks)
            self._loads.append(self._loads_record(columns, loads), columns)
        if self._claims is not None and self._log is not None and self._log.step is not None:
            columns = (self._segment, index, report.step, group.first_rank, group.num_ranks)
            record, whole = self._claims_record(columns, self._log.step)
            self._claims.append(record, whole)
        self._index += 1
        self._choose()

    def report(self) -> RoutingReport:
        """Return what was recorded; of the loads on the group's first rank alone."""
        loads, claims = self._loads, self._claims
        return RoutingReport(
            folder=str(self._folder),
            segment=self._segment,
            steps=0 if loads is None else loads.num_written,
            every=1 if loads is None else loads.header.every,
            claims_steps=None if claims is None else claims.num_written,
        )

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        if self._log is not None:
            self._log.step = None
        for writer in (self._loads, self._claims):
            if writer is not None:
                writer.close()

    def _choose(self) -> None:
        """Have the claims of the next step logged if they are to be kept."""
        if self._log is not None:
            is_kept = self._claims is not None and self._claims.keeps(self._index)
            self._log.step = {} if is_kept else None

    def _loads_record(self, columns: tuple[int, ...], loads: StepLoads) -> bytes:
        header = self._header
        num_experts = header.num_experts
        record = np.zeros(NUM_COLUMNS + len(header.layers) * num_experts, dtype="<i4")
        record[:NUM_COLUMNS] = columns
        rows_LE = record[NUM_COLUMNS:].reshape(-1, num_experts)
        for place, layer in enumerate(header.layers):
            if layer in loads:
                rows_LE[place] = loads[layer][0]
        return record.tobytes()

    def _claims_record(
        self, columns: tuple[int, ...], step: dict[int, list[LayerClaims]]
    ) -> tuple[bytes, tuple[int, ...]]:
        """Return a record and the columns with which it begins."""
        layers = self._header.layers
        counts = [sum(len(each.request_T) for each in step.get(layer, ())) for layer in layers]
        columns = (*columns, sum(counts))
        parts = [np.array([*columns, *counts], dtype="<i4")]
        if step:
            joined = join_claims(
                [each for layer in layers for each in step.get(layer, ())], self._header.top_k
            )
            parts += [
                joined.request_T.astype("<i4"),
                joined.position_T.astype("<i4"),
                joined.topk_ids_TK.astype("<i4"),
                joined.scores_TK.astype("<f4"),
                joined.eligible_T.astype(np.uint8),
            ]
        return b"".join(part.tobytes() for part in parts), columns
