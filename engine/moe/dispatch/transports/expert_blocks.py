"""Expert blocks: rows in blocks of one length per expert, and the same rows one after the other.

Libraries number the experts of all ranks as if every rank had as many, and some deliver the rows of
an expert at the beginning of a block that has room for all that could come. `run_bounded` takes
rows without gaps. All of this is on the device, and every shape follows from bounds.

Worked example, 2 experts, blocks of 4 rows, counts [1, 3], 5 places: the rows are 0 of block 0 and
0 to 2 of block 1, so places 0 to 3 are rows 0, 4, 5, 6 of the blocks and place 4 is any row. Back,
the blocks are places [0, 1, 2, 3], of which 1 to 3 are not read, and [1, 2, 3, 4].

Legend: R places, e experts of this rank, E experts in the order of their ranks, B rows per block.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.ops.to_device import to_device


def equal_ids(first_experts: tuple[int, ...], device: torch.device) -> torch.Tensor | None:
    """Return the number of each expert where all ranks have as many numbers, int64 [E + 1], the
    last -1, so that -1 stays -1; None: the numbers are the experts.

    Worked example: ranks with 3 and 2 experts have numbers 0 to 2 and 3 to 5, so expert 3 is 3 and
    expert 4 is 4; with 2 and 3 experts, expert 2 is 3.
    """
    counts = np.diff(first_experts)
    if (counts == counts[0]).all():
        return None
    rank_E = np.repeat(np.arange(len(counts)), counts)
    local_E = np.arange(first_experts[-1]) - np.asarray(first_experts)[rank_E]
    ids_E1 = np.append(rank_E * counts.max() + local_E, -1)
    return to_device(torch.from_numpy(ids_E1.astype(np.int64)), device)


def rows_of_places(load_e: torch.Tensor, block: int, place_R: torch.Tensor) -> torch.Tensor:
    """Return which row of the blocks [e * B] each place has, int64 [R]; any row past the last.

    Args:
        load_e: int64, rows of each expert.
        block: B.
        place_R: 0 .. R - 1.
    """
    ends_e = load_e.cumsum(0)
    expert_R = torch.searchsorted(ends_e, place_R, right=True).clamp_(max=load_e.shape[0] - 1)
    before_e = ends_e - load_e
    row_R = expert_R * block + (place_R - before_e[expert_R])
    return row_R.clamp_(max=load_e.shape[0] * block - 1)


def places_of_rows(load_e: torch.Tensor, slot_B: torch.Tensor, num_places: int) -> torch.Tensor:
    """Return which place each row of the blocks has, int64 [e * B]; any where there is no row.

    Args:
        load_e: int64, rows of each expert.
        slot_B: 0 .. B - 1.
        num_places: R.
    """
    before_e = load_e.cumsum(0) - load_e
    return (before_e[:, None] + slot_B).clamp_(max=num_places - 1).flatten()
