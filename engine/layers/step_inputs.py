"""Step inputs: one step's tokens and cache addresses as tensors, the same for every layer.

Built by `generation/runner.py` from a `Step`. The tokens of all sequences are flattened to rows,
decodes first, then prefills; `slots_T` and the block tables address the cache of `kv_cache.py`.

Worked example, block size 4, A decodes at position 6, B's prompt of 3 tokens runs whole:

    positions_T      6, 0, 1, 2
    query_start_S1   0, 1, 4
    query_lens       1, 3
    context_lens     7, 3
    rows_R           0, 3          (both are read for their last token alone)

Legend: T tokens of the step, S sequences, S1 = S + 1, B columns of the block table, R rows whose
final hidden state is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """Which sequences attend with how many tokens, and where their keys are. S may be 0."""

    query_start_S1: torch.Tensor  # int32, sequence s has the query rows [start[s], start[s + 1])
    query_lens: list[int]  # the same as lengths; the queries are a context's last tokens
    context_lens: list[int]  # tokens per sequence in the cache after this step
    context_lens_S: torch.Tensor  # int32, the same on the device
    block_table_SB: torch.Tensor  # int32, the blocks of each sequence in order
    # int64, the row of each sequence in the recurrent states; None where the model has none, and of
    # the rows that are read: a layer with states advances all T tokens.
    states_S: torch.Tensor | None = None
    plan: Any = None  # of the attention backend, see `attention_backends/backend.py`


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRows:
    """The tokens of a step whose final hidden state is read: the last ones of each sequence."""

    rows_R: torch.Tensor  # int64, their rows among the step's tokens, ascending
    queries: Queries  # of the sequences that have any


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """One step's tokens, flattened: decodes first, then prefills. T may be 0."""

    token_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    slots_T: torch.Tensor  # int64, cache slot of each token's key: block * block_size + offset
    queries: Queries  # of all T tokens
    read: ReadRows | None = None  # the tokens whose final hidden state is read; None: all
    # int32 [1], how many of the tokens exist, the first ones, in a step of decodes whose buffers
    # have room for more; None: all.
    num_live_1: torch.Tensor | None = None

    @property
    def live_T(self) -> torch.Tensor | None:
        """Which tokens exist, bool; None: all. Decode row t starts at t."""
        num_1 = self.num_live_1
        return None if num_1 is None else self.queries.query_start_S1[:-1] < num_1
