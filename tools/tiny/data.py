"""Training batches as a pure function of the step, so that a resumed run sees what it would have.

Every row is either a window of library text or a packing of task records. Targets carry weights:
text 1, answers ANSWER_WEIGHT, and the random words of a prompt, which nothing could predict,
FILLER_WEIGHT.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from tiny.corpus import BOS_ID, EOS_ID
from tiny.tasks import Record, sample_train_record
from torch import Tensor
from transformers import PreTrainedTokenizerFast

ANSWER_WEIGHT = 3.0
FILLER_WEIGHT = 0.2


def record_tokens(
    tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> list[tuple[list[int], list[float]]]:
    """Return token ids (BOS, prompt, answer, EOS) of each record, and their target weights."""
    encoded = tokenizer([r.prompt + r.answer for r in records], return_offsets_mapping=True)
    out = []
    for record, ids, offsets in zip(
        records, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        weights = []
        for start, end in offsets:
            is_known = any(low <= start and end <= high for low, high in record.known)
            is_sure = end > start and (start >= len(record.prompt) or is_known)
            weights.append(ANSWER_WEIGHT if is_sure else FILLER_WEIGHT)
        out.append(([*ids, EOS_ID], [*weights, ANSWER_WEIGHT]))
    return out


class Batches:
    """Draws the batch of any step from the text stream and the task generators."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stream: np.ndarray, seed: int) -> None:
        self.tokenizer = tokenizer
        self.stream = stream
        self.seed = seed

    def batch(
        self,
        step: int,
        *,
        num_rows: int,
        length: int,
        num_task_rows: int,
        task_shares: Mapping[str, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs and targets, int64 [num_rows, length], and target weights, float32."""
        rng = random.Random(f"{self.seed}-{step}")
        ids = np.empty((num_rows, length + 1), dtype=np.int64)
        weights = np.ones((num_rows, length + 1), dtype=np.float32)
        for row in range(num_rows):
            if row < num_task_rows:
                ids[row], weights[row] = self._task_row(rng, length + 1, task_shares)
            else:
                start = rng.randrange(self.stream.size - length)
                ids[row, 0] = BOS_ID
                ids[row, 1:] = self.stream[start : start + length]
        ids_BS, weights_BS = torch.from_numpy(ids), torch.from_numpy(weights)
        return ids_BS[:, :-1], ids_BS[:, 1:], weights_BS[:, 1:]

    def _task_row(
        self, rng: random.Random, size: int, shares: Mapping[str, float]
    ) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < size:
            records = [sample_train_record(rng, shares) for _ in range(16)]
            for record_ids, record_weights in record_tokens(self.tokenizer, records):
                ids += record_ids
                weights += record_weights
        return ids[:size], weights[:size]
