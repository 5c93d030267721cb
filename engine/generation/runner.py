"""Runner: turns a scheduler step into tensors and runs the model on them.

Input is a `Step` (`step.py`), output the final hidden states of the rows that are read, from which
`logits` makes logits. Holds the KV cache tensors; a sequence's `block_ids` say which blocks are
its own, its `state_row` which row of the recurrent states where layers have any. A step without
tokens still runs the MoE layers, whose collectives need every rank.

Legend: T tokens of the step, R of them that are read, S sequences, B columns of the block table, D
model dim, F tokens of the step that are pending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from engine.generation.step import Slice, Step
from engine.layers.attention_backends.backend import plan_step
from engine.layers.kv_cache import KVCache
from engine.layers.step_inputs import Queries, ReadRows, StepTensors
from engine.models.decoder import GroupTokens
from engine.models.language_model import LanguageModel
from engine.moe.dispatch.two_batch import run_to_end
from engine.moe.step import MoEStep
from engine.ops.to_device import all_to_device, to_device


@dataclass(frozen=True, slots=True)
class Fed:
    """New tokens of the step before, which this one runs while the host has not read them."""

    tokens_S: torch.Tensor  # int64, on the model's device
    row_of: dict[int, int]  # id of a sequence -> its row of `tokens_S`


@dataclass(frozen=True, slots=True)
class Hidden:
    """Final hidden states of a step's rows that are read."""

    states_RD: torch.Tensor  # on the model's device
    rows_R: np.ndarray | None  # int64, their row numbers in the step, ascending; None: all rows


class Runner:
    """Runs steps on one rank.

    Which block of `cache` belongs to which sequence is the scheduler's decision.
    """

    def __init__(self, model: LanguageModel, cache: KVCache, device: torch.device) -> None:
        self.model = model
        self.cache = cache
        self.device = device
        self._has_states = cache.spec.has_states

    @torch.inference_mode()
    def forward(
        self,
        step: Step,
        moe_step: MoEStep | None = None,
        group: GroupTokens | None = None,
        may_split: bool = False,
        fed: Fed | None = None,
    ) -> Hidden:
        """Run the step's tokens; return their final hidden states.

        Args:
            step: may be empty.
            moe_step: which tokens are subject to expert capacity; None: none.
            group: tokens of the step over all ranks of the expert-parallel group.
            may_split: whether the step may run as two micro-batches, because some rank has two
                sequences; the same on every rank.
            fed: where tokens of the step are pending.

        Collective over EP and TP: every rank must call.
        """
        rows_R = _read_rows(step.slices)
        if may_split and moe_step is None and group and self.model.splits_batch(group.all):
            cut = balanced_cut([piece.length for piece in step.slices])
            first, second = step.slices[:cut], step.slices[cut:]
            batches = self._planned(first, 0, fed), self._planned(second, 1, fed)
            return Hidden(self.model.forward_two_batch(batches, self.cache, group), rows_R)
        tensors = self._planned(step.slices, 0, fed)
        # The generator itself: one frame less than `CausalLM.forward` between step and kernel.
        steps = self.model.steps(tensors, self.cache, moe_step, group)
        return Hidden(run_to_end(steps), rows_R)

    @torch.inference_mode()
    def logits(self, hidden: Hidden, rows: list[int]) -> torch.Tensor:
        """Return float32 logits [len(rows), vocabulary].

        Args:
            rows: row numbers of the step, all of them read.
        """
        states_RD = hidden.states_RD
        index = np.asarray(rows, dtype=np.int64)
        if hidden.rows_R is not None:
            index = np.searchsorted(hidden.rows_R, index)
        if not np.array_equal(index, np.arange(states_RD.shape[0])):
            states_RD = states_RD.index_select(0, self._upload(index))
        return self.model.logits(states_RD)

    def build(self, slices: Sequence[Slice], fed: Fed | None = None) -> StepTensors:
        """Flatten slices, in order, into the model's input; `fed` as in `forward`."""
        block_size = self.cache.block_size
        starts_S = np.array([piece.start for piece in slices], dtype=np.int64)
        lens_S = np.array([piece.length for piece in slices], dtype=np.int64)
        ends_S = starts_S + lens_S
        blocks_S = -(-ends_S // block_size)
        # One table for all sequences, padded with block 0: a row per sequence, its blocks in order.
        table_SB = np.zeros((len(slices), int(blocks_S.max(initial=0))), dtype=np.int32)
        tables = [
            piece.seq.block_ids[:blocks]
            for piece, blocks in zip(slices, blocks_S.tolist(), strict=True)
        ]
        table_SB[np.arange(table_SB.shape[1]) < blocks_S[:, None]] = list(chain(*tables))
        # A token's cache slot follows from its sequence's block table and its position.
        tokens = [piece.seq.token_ids[piece.start : piece.start + piece.length] for piece in slices]
        rows_F: list[int] = []
        if fed is not None:
            # Pending tokens are those of decode slices, of one row each, which come first.
            rows_F = [row for row, piece in enumerate(slices) if piece.is_pending]
            for row in rows_F:
                tokens[row] = [0]
        positions_T = _spans(starts_S, lens_S)
        sequence_T = np.repeat(np.arange(len(slices)), lens_S)
        block_T = table_SB[sequence_T, positions_T // block_size].astype(np.int64)
        token_ids_T = np.array(list(chain(*tokens)), dtype=np.int64)
        slots_T = block_T * block_size + positions_T % block_size
        arrays = [token_ids_T, positions_T, slots_T, *_query_arrays(lens_S, ends_S, table_SB)]
        # The rows that are read are queries of their own, unless all are.
        rows_R = _read_rows(slices)
        read_S = np.array([piece.num_read for piece in slices], dtype=np.int64)
        some = read_S > 0
        if rows_R is not None:
            arrays += [rows_R, *_query_arrays(read_S[some], ends_S[some], table_SB[some])]
        if self._has_states:
            arrays.append(np.array([piece.seq.state_row for piece in slices], dtype=np.int64))
        if fed is not None:
            sources_F = [fed.row_of[id(slices[row].seq)] for row in rows_F]
            arrays += [np.array(each, dtype=np.int64) for each in (rows_F, sources_F)]
        # One copy to the device for all of them.
        sent = all_to_device([torch.from_numpy(array) for array in arrays], self.device)
        if fed is not None:
            source_F, row_F = sent.pop(), sent.pop()
            sent[0].index_copy_(0, row_F, fed.tokens_S.index_select(0, source_F))
        states_S = sent.pop() if self._has_states else None
        read = None
        if rows_R is not None:
            read = ReadRows(rows_R=sent[6], queries=_queries(read_S[some], ends_S[some], *sent[7:]))
        return StepTensors(
            token_ids_T=sent[0],
            positions_T=sent[1],
            slots_T=sent[2],
            queries=_queries(lens_S, ends_S, *sent[3:6], states_S=states_S),
            read=read,
        )

    def _planned(
        self, slices: Sequence[Slice], micro_batch: int, fed: Fed | None = None
    ) -> StepTensors:
        """Return the model's input, with the plans of the attention backend."""
        model, tensors = self.model, self.build(slices, fed)
        return plan_step(model.attention_backend, model.attention_kinds, tensors, micro_batch)

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(array), self.device)


def _query_arrays(
    lens_S: np.ndarray, contexts_S: np.ndarray, table_SB: np.ndarray
) -> list[np.ndarray]:
    """Return the arrays of `Queries` that go to the device."""
    start_S1 = np.concatenate(([0], np.cumsum(lens_S))).astype(np.int32)
    return [start_S1, contexts_S.astype(np.int32), table_SB]


def _queries(
    lens_S: np.ndarray,
    contexts_S: np.ndarray,
    start_S1: torch.Tensor,
    context_lens_S: torch.Tensor,
    table_SB: torch.Tensor,
    states_S: torch.Tensor | None = None,
) -> Queries:
    """Return the queries of a step, with the tensors of `_query_arrays`."""
    return Queries(
        query_start_S1=start_S1,
        query_lens=lens_S.tolist(),
        context_lens=contexts_S.tolist(),
        context_lens_S=context_lens_S,
        block_table_SB=table_SB,
        states_S=states_S,
    )


def _read_rows(slices: Sequence[Slice]) -> np.ndarray | None:
    """Return the rows whose final hidden state is read, int64, ascending; None where all are."""
    lens_S = np.array([piece.length for piece in slices], dtype=np.int64)
    read_S = np.array([piece.num_read for piece in slices], dtype=np.int64)
    if (lens_S == read_S).all():
        return None
    return _spans(np.cumsum(lens_S) - read_S, read_S)


def _spans(starts_S: np.ndarray, lens_S: np.ndarray) -> np.ndarray:
    """Return starts[0], starts[0] + 1, ... (lens[0] numbers), then starts[1], ...: int64."""
    before_S = np.cumsum(lens_S) - lens_S
    return np.arange(lens_S.sum()) + np.repeat(starts_S - before_S, lens_S)


def balanced_cut(lengths: Sequence[int]) -> int:
    """Return how many leading slices form the first micro-batch, for the most even cut by tokens.

    Of equal cuts the later one, so a single slice is in the first micro-batch.

    Worked example: lengths 1 1 1 900 700 are cut after the fourth: 903 and 700 tokens.
    """
    total, before, best, cut = sum(lengths), 0, sum(lengths), 0
    for index, length in enumerate(lengths):
        before += length
        if abs(total - 2 * before) <= best:
            best, cut = abs(total - 2 * before), index + 1
    return cut
