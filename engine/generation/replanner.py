"""Replanner: changes the copies of experts while a job runs (`moe.copies.replan`).

Every N steps the first rank of an expert-parallel group plans from the loads of those steps, in a
thread (`placement/replan.py`). What follows is the same on all ranks, before the same step:

    plan     the first rank's control message says that its plan is ready: it is broadcast
    stage    the ranks whose experts are copied make what copies hold, in a thread; their control
             messages say when they have it
    move     one all-to-all per step carries a bounded number of rows of weights, behind the step
    switch   once all copies of a layer have arrived, their weights are replaced and the layer uses
             the new instances; then the next layer moves

A copy computes until it is replaced. Where a rank is lost, the job starts again from the placement
file, as it began.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from engine.distributed.collectives import GroupCollectives, Pending, broadcast_object
from engine.distributed.groups import Topology
from engine.generation.control import ControlMessage
from engine.models.language_model import LanguageModel
from engine.moe.copy_weights import copy_parts, read_bytes, read_home, write_bytes
from engine.moe.dispatch.exchange import AllToAll, Exchange
from engine.moe.placement.placement import Placement
from engine.moe.placement.placement_file import digest
from engine.moe.placement.replan import Move, choose_moves, moved
from engine.profiling.loads import LoadCounter

logger = logging.getLogger(__name__)

_ROW_BYTES = 1 << 20  # of weights in one row of the all-to-all
_ROWS_PER_STEP = {"cpu": 4, "cuda": 64}  # over all ranks
_PLANNED, _STAGED, _FAILED = 1, 2, 3  # what a control message says of its rank

OnChange = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of one copy's weights."""

    move: Move
    start: int  # byte


class _Work:
    """A function that runs in a thread; its result or its error, once it has ended."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: Exception | None = None
        self._function = function
        self._thread = threading.Thread(target=self._run, name="replan", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        try:
            self.result = self._function()
        except Exception as error:  # a plan that fails must not end the job
            self.error = error


class Replanner:
    """Replaces copies on one rank, together with the ranks of its group.

    Args:
        model: with copies.
        topology: of the run.
        every: N.
        on_change: called on the first rank of each group after a layer has changed.
    """

    def __init__(
        self,
        model: LanguageModel,
        topology: Topology,
        every: int,
        on_change: OnChange | None = None,
    ) -> None:
        assert model.placement is not None
        self.num_moves = 0  # so far
        self._model, self._topology, self._every = model, topology, every
        self._on_change = on_change
        self._layers = {each.layer: each for each in model.moe_layers if each.instances.has_copies}
        self._exchange = Exchange(topology.expert, GroupCollectives(topology.expert))
        self._rank = topology.expert.rank
        self._rows_per_step = _ROWS_PER_STEP[topology.device.type]
        self._steps = 0
        self._before: dict[int, np.ndarray] = {}  # total loads when the last plan was made
        self._work: _Work | None = None
        self._waits_for = 0  # what control messages must say before the next stage
        self._moves: list[Move] = []
        self._rows: list[_Row] = []  # of the layer that moves
        self._sources: dict[Move, list[torch.Tensor]] = {}
        self._arrived: dict[Move, list[torch.Tensor]] = {}
        # With the rows that are sent, which must stay until they are.
        self._flying: tuple[Pending, list[_Row], torch.Tensor, torch.Tensor] | None = None

    @property
    def stage(self) -> int:
        """What this rank's control message says: its thread has planned, or staged."""
        if self._work is None or not self._work.done:
            return 0
        has_failed = self._waits_for == _STAGED and self._work.error is not None
        return _FAILED if has_failed else self._waits_for

    def advance(self, messages: Sequence[ControlMessage], loads: LoadCounter) -> None:
        """Do what is due before a step. Collective over EP: every rank must call."""
        if self._waits_for == _PLANNED:
            if messages[0].replan == _PLANNED:
                self._receive_plan()
        elif self._waits_for == _STAGED:
            stages = [message.replan for message in messages]
            if all(stage >= _STAGED for stage in stages):
                if _FAILED in stages:
                    self._give_up()
                else:
                    self._begin_moves()
        elif self._flying is not None or self._moves:
            self._land()
            self._send()
        else:
            self._steps += 1
            if self._steps % self._every == 0:
                self._begin_plan(loads)

    def finish(self) -> None:
        """Wait for what is under way, at the end of a run or before an error is raised."""
        if self._work is not None:
            self._work.join()
        if self._flying is not None:
            self._flying[0].wait()
        self._work, self._flying, self._waits_for = None, None, 0
        self._moves, self._rows, self._arrived, self._sources = [], [], {}, {}

    def _begin_plan(self, loads: LoadCounter) -> None:
        window: dict[int, np.ndarray] = {}
        for index in self._layers:
            if (total := loads.layers.get(index)) is not None:
                before = self._before.get(index)
                fresh = before is None or (total.experts < before).any()
                window[index] = total.experts.copy() if fresh else total.experts - before
                self._before[index] = total.experts.copy()
        self._waits_for = _PLANNED
        if self._rank == 0:
            instances = {index: self._layers[index].instances for index in window}
            placement = self._model.placement
            times_W = placement.row_times_W if placement is not None else ()
            self._work = _Work(lambda: choose_moves(instances, window, times_W or None))

    def _receive_plan(self) -> None:
        moves: list[Move] = []
        if self._rank == 0 and self._work is not None:
            if self._work.error is not None:
                logger.warning("moe.copies.replan: no plan was made: %s", self._work.error)
            moves = self._work.result or []
        self._moves = broadcast_object(moves, self._topology.control)
        self._work, self._waits_for = None, 0
        if self._moves:
            self._waits_for = _STAGED
            own = [move for move in self._moves if move.source == self._rank]
            self._work = _Work(lambda: {move: self._read(move) for move in own})

    @torch.inference_mode()
    def _read(self, move: Move) -> list[torch.Tensor]:
        layer = self._layers[move.layer]
        return read_home(layer.experts, layer.local_experts.index(move.expert))

    def _give_up(self) -> None:
        """Forget a plan whose weights some rank cannot prepare; the copies stay."""
        if self._work is not None and self._work.error is not None:
            logger.warning(
                "moe.copies.replan: rank %d cannot prepare an expert's weights, so the copies "
                "stay: %s",
                self._topology.world.rank,
                self._work.error,
            )
        self._work, self._waits_for, self._moves = None, 0, []

    def _begin_moves(self) -> None:
        assert self._work is not None
        self._sources = self._work.result
        self._work, self._waits_for = None, 0
        self._queue_layer()
        self._send()

    def _queue_layer(self) -> None:
        """Queue the rows of the first layer that is left."""
        now = [move for move in self._moves if move.layer == self._moves[0].layer]
        experts = self._layers[now[0].layer].experts
        self._arrived = {
            move: [torch.empty_like(part) for part in copy_parts(experts, move.place)]
            for move in now
            if move.rank == self._rank
        }
        length = experts.copy_size
        self._rows = [_Row(move, start) for move in now for start in range(0, length, _ROW_BYTES)]

    def _send(self) -> None:
        """Start the all-to-all of the next rows; the same on every rank."""
        if not self._rows:
            return
        rows, self._rows = self._rows[: self._rows_per_step], self._rows[self._rows_per_step :]
        size, device = self._topology.expert.size, self._topology.device
        out = sorted(
            (row for row in rows if row.move.source == self._rank), key=lambda row: row.move.rank
        )
        into = sorted(
            (row for row in rows if row.move.rank == self._rank), key=lambda row: row.move.source
        )
        send = torch.zeros((len(out), _ROW_BYTES), dtype=torch.uint8, device=device)
        recv = torch.empty((len(into), _ROW_BYTES), dtype=torch.uint8, device=device)
        for row, each in zip(send, out, strict=True):
            read_bytes(self._sources[each.move], each.start, row)
        splits = (
            [sum(each.move.rank == rank for each in out) for rank in range(size)],
            [sum(each.move.source == rank for each in into) for rank in range(size)],
        )
        pending = self._exchange.start(AllToAll(send, recv, *splits))
        self._flying = pending, into, recv, send

    @torch.inference_mode()
    def _land(self) -> None:
        """Wait for the rows in flight; switch the layer whose last ones they are."""
        if self._flying is None:
            return
        pending, into, recv, _ = self._flying
        pending.wait()
        self._flying = None
        for each, row in zip(into, recv, strict=True):
            write_bytes(self._arrived[each.move], each.start, row)
        if not self._rows:
            self._switch()

    def _switch(self) -> None:
        index = self._moves[0].layer
        now = [move for move in self._moves if move.layer == index]
        layer = self._layers[index]
        for move, parts in self._arrived.items():
            for target, part in zip(copy_parts(layer.experts, move.place), parts, strict=True):
                target.copy_(part)
        layer.set_instances(moved(layer.instances, now))
        self._moves = [move for move in self._moves if move.layer != index]
        self.num_moves += len(now)
        for move in now:
            self._sources.pop(move, None)
        self._note(index, now)
        if self._moves:
            self._queue_layer()

    def _note(self, index: int, moves: Sequence[Move]) -> None:
        """Change the model's placement; log and report the change on the first rank."""
        placement = self._model.placement
        assert placement is not None
        layers = {**placement.layers, index: self._layers[index].instances.placement}
        self._model.placement = changed = Placement(
            placement.num_ranks,
            placement.num_experts,
            layers,
            placement.precision,
            placement.fingerprint,
            placement.domains,
            placement.row_times_W,
        )
        if self._rank:
            return
        logger.info(
            "moe.copies.replan: layer %d has %d other copies: %s",
            index,
            len(moves),
            ", ".join(f"expert {move.expert} on rank {move.rank}" for move in moves),
        )
        if self._on_change is not None:
            self._on_change(
                {"moves": [asdict(move) for move in moves], "placement": digest(changed)}
            )
