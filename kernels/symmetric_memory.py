"""torch's symmetric memory with NVSHMEM: row exchanges whose counts stay on the device.

Read in torch 2.13.0 (November 2026), not run on a GPU yet. The operators have had these arguments
since torch 2.9; another signature is refused rather than called. Imported when it is asked for:
builds without CUDA have the operators' names alone.

Legend: W ranks, e experts per rank (the same number for all), R, S rows, D their width.
"""

from __future__ import annotations

from typing import Any

import torch

# The exchange by expert, and the one that undoes it.
OUT = "symm_mem::all_to_all_vdev_2d(Tensor input, Tensor(a!) out, Tensor in_splits, "
OUT += "Tensor(a!) out_splits_offsets, str group_name, int? major_align=None) -> ()"
HOME = "symm_mem::all_to_all_vdev_2d_offset(Tensor input, Tensor(a!) out, "
HOME += "Tensor in_splits_offsets, Tensor(a!) out_splits_offsets, str group_name) -> ()"

# Blocks of 512 threads in tiles of 32: both operators scan with a tile per expert or rank.
MOST_RANKS = MOST_EXPERTS = 16
_BACKEND = "NVSHMEM"


def obstacle() -> str | None:
    """Return a clause about why this torch cannot exchange rows so; None: it can."""
    for schema in (OUT, HOME):
        name = schema.partition("(")[0].removeprefix("symm_mem::")
        if (found := _schema(name)) != schema:
            has = "does not have" if found is None else "has with other arguments"
            return (
                f"it needs {schema.partition('(')[0]} as torch 2.13 has it, which torch "
                f"{torch.__version__} {has}"
            )
    if not _memory().is_nvshmem_available():
        return (
            f"it needs NVSHMEM, and torch {torch.__version__} was built without it or cannot load "
            "it; the CUDA builds of torch for Linux bring it (package nvidia-nvshmem)"
        )
    return None


def allocate(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, group: Any
) -> torch.Tensor:
    """Return a tensor that the ranks of a process group reach at the same place, undefined.

    Collective over the group: every rank must call, with the same shape and dtype.

    Raises:
        RuntimeError: symmetric memory of another kind is in use in this process, or there is none.
    """
    memory = _memory()
    if memory.get_backend(device) != _BACKEND:
        memory.set_backend(_BACKEND)
    tensor = memory.empty(shape, dtype=dtype, device=device)
    memory.rendezvous(tensor, group.group_name)
    return tensor


def send_out(
    rows_SD: torch.Tensor,
    out_RD: torch.Tensor,
    splits_N: torch.Tensor,
    found_2N: torch.Tensor,
    group: Any,
) -> None:
    """Exchange rows that are sorted by rank and expert; they arrive by expert, then by rank.

    An expert without rows still takes one place. All four tensors are of `allocate`.

    Args:
        rows_SD: contiguous; those past the splits' sum are not read.
        out_RD: contiguous; undefined past the last row.
        splits_N: int64 [W * e], rows for each expert.
        found_2N: int64 [2, e * W], written: rows from each rank for each of this rank's experts,
            and where in out_RD they begin.
        group: the process group.

    Collective over the group.
    """
    torch.ops.symm_mem.all_to_all_vdev_2d(rows_SD, out_RD, splits_N, found_2N, group.group_name)


def send_home(
    rows_RD: torch.Tensor,
    out_SD: torch.Tensor,
    found_2N: torch.Tensor,
    home_2N: torch.Tensor,
    group: Any,
) -> None:
    """Undo `send_out`: every row arrives where it was sent from.

    All four tensors are of `allocate`.

    Args:
        rows_RD: rows at the places where `send_out` put them.
        out_SD: undefined past the last row.
        found_2N: int64 [2, e * W], as `send_out` wrote it.
        home_2N: int64 [2, W * e], written: the rows that each expert has sent back, and where.
        group: the process group.

    Collective over the group.
    """
    torch.ops.symm_mem.all_to_all_vdev_2d_offset(
        rows_RD, out_SD, found_2N, home_2N, group.group_name
    )


def _memory() -> Any:
    import torch.distributed._symmetric_memory as memory

    return memory


def _schema(name: str) -> str | None:
    """Return an operator's signature; None: there is none of the name."""
    operator = getattr(torch.ops.symm_mem, name, None)
    return None if operator is None else str(operator.default._schema)
