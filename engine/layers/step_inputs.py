"""Inputs of one step that every attention layer reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """Which sequences attend with how many tokens, and where their keys lie.

    query_start_S1: int32, sequence s has rows query_start[s] .. query_start[s + 1] of the queries.
    query_lens: the same as lengths, on the host; they are a context's last tokens. context_lens: a
    sequence's tokens in the cache after this step, on the host and as int32. block_table_SB: int32,
    the blocks of each sequence in order. S may be 0.
    """

    query_start_S1: torch.Tensor
    query_lens: list[int]
    context_lens: list[int]
    context_lens_S: torch.Tensor
    block_table_SB: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadRows:
    """The tokens of a step whose final hidden state is read; of each sequence they are the last.

    rows_R: int64, their rows among the step's tokens, ascending. queries: of the sequences that
    have any.
    """

    rows_R: torch.Tensor
    queries: Queries


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """One step's tokens, flattened: decodes first, then prefills.

    token_ids_T, positions_T: int64. slots_T: int64, where each token's key goes (block * block_size
    + offset). queries: of all of them. read: the tokens whose final hidden state is read, None
    where all are. T may be 0.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    queries: Queries
    read: ReadRows | None = None
