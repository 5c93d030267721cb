"""Runner: one scheduler step becomes tensors, goes through the model, and comes back as hidden rows
that need logits.

Between `loop.py`, which drives it, and `models/decoder.py`. It owns the KV cache tensors.

Legend: T tokens of the step, R of them that are read, S sequences, B columns of the block table, D
model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from engine.generation.step import Slice, Step
from engine.layers.kv_cache import KVCache
from engine.layers.step_inputs import Queries, ReadRows, StepTensors
from engine.models.decoder import CausalLM, GroupTokens
from engine.moe.step import MoEStep
from engine.ops.to_device import to_device


@dataclass(frozen=True, slots=True)
class Hidden:
    """Final hidden states of a step's rows that are read.

    states_RD: on the model's device. rows_R: int64, their numbers among the step's rows, ascending;
    None where all rows are there.
    """

    states_RD: torch.Tensor
    rows_R: np.ndarray | None


class Runner:
    """Runs steps on one rank. `cache` holds the keys and values; the scheduler owns its block
    numbers.
    """

    def __init__(self, model: CausalLM, cache: KVCache, device: torch.device) -> None:
        self.model = model
        self.cache = cache
        self.device = device

    @torch.inference_mode()
    def forward(
        self,
        step: Step,
        moe_step: MoEStep | None = None,
        group: GroupTokens | None = None,
        may_split: bool = False,
    ) -> Hidden:
        """Run the step's tokens; return what their logits are made of. Collective over EP: every
        rank must call.

        moe_step: who competes for expert capacity; None where nobody does. group: tokens of the
        step over all ranks of the expert-parallel group. may_split: some rank has two sequences to
        run as half batches; the same on every rank.

        An empty step is fine: the rank takes part in the MoE layers with zero tokens.
        """
        rows_R = _read_rows(step.slices)
        if may_split and moe_step is None and group is not None and self.model.splits(group.all):
            cut = balanced_cut([piece.length for piece in step.slices])
            halves = self.build(step.slices[:cut]), self.build(step.slices[cut:])
            return Hidden(self.model.forward_two_batch(halves, self.cache, group), rows_R)
        tensors = self.build(step.slices)
        return Hidden(self.model(tensors, self.cache, moe_step, group), rows_R)

    @torch.inference_mode()
    def logits(self, hidden: Hidden, rows: list[int]) -> torch.Tensor:
        """Float32 logits [len(rows), vocabulary] of rows of the step, which are read."""
        states_RD = hidden.states_RD
        index = np.asarray(rows, dtype=np.int64)
        if hidden.rows_R is not None:
            index = np.searchsorted(hidden.rows_R, index)
        if not np.array_equal(index, np.arange(states_RD.shape[0])):
            states_RD = states_RD.index_select(0, self._upload(index))
        return self.model.logits(states_RD)

    def build(self, slices: Sequence[Slice]) -> StepTensors:
        """Flatten slices, decodes first as the scheduler gives them, into the model's input."""
        block_size = self.cache.block_size
        starts_S = np.array([piece.start for piece in slices], dtype=np.int64)
        lens_S = np.array([piece.length for piece in slices], dtype=np.int64)
        ends_S = starts_S + lens_S
        blocks_S = -(-ends_S // block_size)
        table_SB = np.zeros((len(slices), int(blocks_S.max(initial=0))), dtype=np.int32)
        tables = [
            piece.seq.block_ids[:blocks]
            for piece, blocks in zip(slices, blocks_S.tolist(), strict=True)
        ]
        table_SB[np.arange(table_SB.shape[1]) < blocks_S[:, None]] = list(chain(*tables))
        tokens = [piece.seq.token_ids[piece.start : piece.start + piece.length] for piece in slices]
        positions_T = _spans(starts_S, lens_S)
        sequence_T = np.repeat(np.arange(len(slices)), lens_S)
        block_T = table_SB[sequence_T, positions_T // block_size].astype(np.int64)
        return StepTensors(
            token_ids_T=self._upload(np.array(list(chain(*tokens)), dtype=np.int64)),
            positions_T=self._upload(positions_T),
            slots_T=self._upload(block_T * block_size + positions_T % block_size),
            queries=self._queries(lens_S, ends_S, table_SB),
            read=self._read(slices, ends_S, table_SB),
        )

    def _read(
        self, slices: Sequence[Slice], contexts_S: np.ndarray, table_SB: np.ndarray
    ) -> ReadRows | None:
        rows_R = _read_rows(slices)
        if rows_R is None:
            return None
        read_S = np.array([piece.num_read for piece in slices])
        some = read_S > 0
        return ReadRows(
            rows_R=self._upload(rows_R),
            queries=self._queries(read_S[some], contexts_S[some], table_SB[some]),
        )

    def _queries(self, lens_S: np.ndarray, contexts_S: np.ndarray, table_SB: np.ndarray) -> Queries:
        start_S1 = np.concatenate(([0], np.cumsum(lens_S))).astype(np.int32)
        return Queries(
            query_start_S1=self._upload(start_S1),
            query_lens=lens_S.tolist(),
            context_lens=contexts_S.tolist(),
            context_lens_S=self._upload(contexts_S.astype(np.int32)),
            block_table_SB=self._upload(table_SB),
        )

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(array), self.device)


def _read_rows(slices: Sequence[Slice]) -> np.ndarray | None:
    """The rows whose final hidden state is read, int64, ascending; None where all are."""
    lens_S = np.array([piece.length for piece in slices], dtype=np.int64)
    read_S = np.array([piece.num_read for piece in slices], dtype=np.int64)
    if (lens_S == read_S).all():
        return None
    return _spans(np.cumsum(lens_S) - read_S, read_S)


def _spans(starts_S: np.ndarray, lens_S: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ..., lens[0] numbers of them, and so on: int64 [sum of lens]."""
    before_S = np.cumsum(lens_S) - lens_S
    return np.arange(lens_S.sum()) + np.repeat(starts_S - before_S, lens_S)


def balanced_cut(lengths: Sequence[int]) -> int:
    """How many of the first pieces make the first half, so that the halves differ least.

    Worked example: 1 1 1 900 700 cuts after the fourth piece: 903 and 700. One piece is all in the
    first half. Of equal cuts the later.
    """
    total, before, best, cut = sum(lengths), 0, sum(lengths), 0
    for index, length in enumerate(lengths):
        before += length
        if abs(total - 2 * before) <= best:
            best, cut = abs(total - 2 * before), index + 1
    return cut
