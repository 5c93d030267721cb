"""The decodes and the prefills of a step, which backends run in two calls: their tiles differ.

Decodes, sequences of one query, come first in a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.layers.step_inputs import Queries
from engine.ops.to_device import to_device


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences [first, last) of a step and their query tokens [start, end)."""

    first: int
    last: int
    start: int
    end: int
    is_decode: bool


def parts_of(queries: Queries) -> list[Part]:
    """Return the decodes and the prefills of a step, each only where there are any."""
    lens = queries.query_lens
    decodes = next((index for index, each in enumerate(lens) if each != 1), len(lens))
    ends = (decodes, len(lens))
    parts = [Part(0, decodes, 0, decodes, True), Part(*ends, decodes, sum(lens), False)]
    return [part for part in parts if part.last > part.first]


@dataclass(frozen=True, slots=True)
class Pages:
    """The blocks of a part's sequences as one list, in order (compressed sparse rows)."""

    indptr_S1: torch.Tensor  # int32 on the host: sequence s has indices [indptr[s], indptr[s + 1])
    indices: torch.Tensor  # int32 on the device
    last_len_S: torch.Tensor  # int32 on the host: tokens in each sequence's last block
    context_lens_S: torch.Tensor  # int32 on the host


def pages_of(queries: Queries, part: Part, block_size: int) -> Pages:
    """Return the blocks of a part; one copy to the device and one gather there."""
    table_SB = queries.block_table_SB
    contexts = np.array(queries.context_lens[part.first : part.last], dtype=np.int64)
    counts = -(-contexts // block_size)
    indptr = np.concatenate(([0], np.cumsum(counts)))
    rows = np.repeat(np.arange(part.first, part.last) * table_SB.shape[1] - indptr[:-1], counts)
    places = torch.from_numpy(rows + np.arange(indptr[-1]))
    indices = table_SB.flatten().index_select(0, to_device(places, table_SB.device))
    return Pages(
        indptr_S1=_int32(indptr),
        indices=indices,
        last_len_S=_int32(contexts - (counts - 1) * block_size),
        context_lens_S=_int32(contexts),
    )


def _int32(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int32))
