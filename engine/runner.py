"""Runner: one scheduler step becomes tensors, goes through the model, and comes back as hidden rows
that need logits.

Between `loop.py`, which drives it, and `models/decoder.py`. It owns the KV cache tensors.

Legend: T tokens of the step, S sequences, B columns of the block table, D model dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.layers.attention import StepTensors
from engine.layers.kv import KVCache
from engine.models.decoder import CausalLM
from engine.moe.halves import balanced_cut
from engine.moe.step import MoEStep
from engine.ops.to_device import to_device
from engine.scheduler import Slice, Step


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
        group_tokens: int | None = None,
        may_split: bool = False,
    ) -> torch.Tensor:
        """Run the step's tokens; return their final hidden states [T, D]. Collective over EP: every
        rank must call.

        moe_step: who competes for expert capacity; None where nobody does. group_tokens: tokens of
        the step over all ranks of the expert-parallel group. may_split: some rank has two sequences
        to run as half batches; the same on every rank.

        An empty step is fine: the rank takes part in the MoE layers with zero tokens.
        """
        if (
            may_split
            and moe_step is None
            and group_tokens is not None
            and self.model.splits(group_tokens)
        ):
            cut = balanced_cut([piece.length for piece in step.slices])
            first = self.build(step.slices[:cut], min(cut, step.num_decode))
            second = self.build(step.slices[cut:], max(0, step.num_decode - cut))
            return self.model.forward_halves((first, second), self.cache, group_tokens)
        tensors = self.build(step.slices, step.num_decode)
        return self.model(tensors, self.cache, moe_step, group_tokens)

    @torch.inference_mode()
    def logits(self, hidden_TD: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Float32 logits [len(rows), vocabulary] of the given rows of `forward`'s result."""
        if rows != list(range(hidden_TD.shape[0])):
            index = to_device(torch.tensor(rows, dtype=torch.int64), self.device)
            hidden_TD = hidden_TD.index_select(0, index)
        return self.model.logits(hidden_TD)

    def build(self, slices: Sequence[Slice], num_decode: int) -> StepTensors:
        """Flatten slices, the num_decode decodes first as the scheduler gives them, into the
        model's input.
        """
        block_size = self.cache.block_size
        query_lens = [piece.length for piece in slices]
        context_lens = [piece.start + piece.length for piece in slices]
        query_start = [0, *np.cumsum(query_lens, dtype=np.int64).tolist()] if slices else [0]
        total = query_start[-1]
        token_ids = np.empty(total, dtype=np.int64)
        positions = np.empty(total, dtype=np.int64)
        slots = np.empty(total, dtype=np.int64)
        num_blocks = [-(-length // block_size) for length in context_lens]
        table = np.zeros((len(slices), max(num_blocks, default=0)), dtype=np.int32)
        for row, piece in enumerate(slices):
            blocks = table[row, : num_blocks[row]]
            blocks[:] = piece.seq.block_ids[: num_blocks[row]]
            begin, end = query_start[row], query_start[row + 1]
            if piece.length == 1:
                position = piece.start
                token_ids[begin] = piece.seq.token_ids[position]
                positions[begin] = position
                slots[begin] = blocks[position // block_size] * block_size + position % block_size
                continue
            token_ids[begin:end] = piece.seq.token_ids[piece.start : piece.start + piece.length]
            span = np.arange(piece.start, piece.start + piece.length)
            positions[begin:end] = span
            slots[begin:end] = blocks[span // block_size] * block_size + span % block_size
        return StepTensors(
            token_ids_T=self._upload(token_ids),
            positions_T=self._upload(positions),
            slots_T=self._upload(slots),
            query_start=query_start,
            query_start_S1=self._upload(np.asarray(query_start, dtype=np.int32)),
            query_lens=query_lens,
            context_lens=context_lens,
            context_lens_S=self._upload(np.asarray(context_lens, dtype=np.int32)),
            block_table_SB=self._upload(table),
            num_decode=num_decode,
        )

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(array), self.device)
