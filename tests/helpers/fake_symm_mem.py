"""torch's symmetric memory with NVSHMEM on CPU tensors of gloo ranks, for `with fake_symm_mem()`.

Signatures and rules are those of torch 2.13.0 (read in November 2026: `symm_mem/
nvshmem_extension.cu`, `torch/distributed/_symmetric_memory`). Stricter in two points: an exchange
that reads or writes past a tensor, which a GPU would carry out, is refused, and so is a rank whose
tensor has another shape. Memory that nothing was written to is NaN or negative.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as memory

VERSION = "2.13.0"
SCHEMAS = {
    "all_to_all_vdev_2d": (
        "symm_mem::all_to_all_vdev_2d(Tensor input, Tensor(a!) out, Tensor in_splits, "
        "Tensor(a!) out_splits_offsets, str group_name, int? major_align=None) -> ()"
    ),
    "all_to_all_vdev_2d_offset": (
        "symm_mem::all_to_all_vdev_2d_offset(Tensor input, Tensor(a!) out, "
        "Tensor in_splits_offsets, Tensor(a!) out_splits_offsets, str group_name) -> ()"
    ),
}
_WARP, _TILES = 32, 512 // 32  # lanes of a scan, scans of a block
Unwrap = Callable[[torch.Tensor], torch.Tensor]


class ContractError(ValueError):
    """A call that torch refuses, or computes wrongly without a sign of it."""


def _demand(holds: bool, rule: str) -> None:
    if not holds:
        raise ContractError(rule)


class SymmMem:
    """The state of one process. unwrap: gives the numbers of a device's tensor."""

    def __init__(self, unwrap: Unwrap = lambda tensor: tensor) -> None:
        self.backend: str | None = None
        self.calls = 0
        self._unwrap = unwrap
        self._held: list[torch.Tensor] = []  # as allocated
        self._met: set[tuple[int, str]] = set()  # address and group of each rendezvous

    def set_backend(self, name: str) -> None:
        """Choose the kind of memory, before any is allocated."""
        _demand(not self._held, "the backend cannot change once memory is allocated")
        self.backend = name

    def empty(
        self, *size: Any, dtype: torch.dtype | None = None, device: Any = None
    ) -> torch.Tensor:
        """Allocate."""
        _demand(self.backend == "NVSHMEM", "NVSHMEM is not the backend")
        shape = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self._unwrap(tensor).fill_(float("nan") if tensor.is_floating_point() else -(1 << 40))
        self._held.append(tensor)
        return tensor

    def rendezvous(self, tensor: torch.Tensor, group: str) -> None:
        """Let the ranks of a group meet, all with the same shape and dtype."""
        own = self._unwrap(tensor)
        _demand(
            any(own.data_ptr() == self._unwrap(each).data_ptr() for each in self._held), "empty"
        )
        width = own.shape[-1] if own.dim() > 1 else 1
        mine = torch.tensor([own.shape[0], width, own.itemsize])
        size = _group(group).size()
        all_W3 = _all_to_all(group, mine.repeat(size, 1), [1] * size, [1] * size)
        _demand(bool((all_W3 == mine).all()), "shape and dtype are equal on all ranks")
        self._met.add((own.data_ptr(), group))

    def all_to_all_vdev_2d(
        self,
        input: torch.Tensor,
        out: torch.Tensor,
        in_splits: torch.Tensor,
        out_splits_offsets: torch.Tensor,
        group_name: str,
        major_align: int | None = None,
    ) -> None:
        """Shuffle rows from rank-major to expert-major order."""
        rows, out_RD, splits_N, found_2N = self._checked(
            group_name, input, out, in_splits, out_splits_offsets
        )
        size, align = _group(group_name).size(), 1 if major_align is None else major_align
        _demand(align > 0, "major_align is positive")
        _demand(splits_N.dim() == 1 and splits_N.numel() % size == 0, "in_splits is [W * e]")
        _demand(found_2N.shape == (2, splits_N.numel()), "out_splits_offsets is [2, W * e]")
        num_local = splits_N.numel() // size
        _demand(size <= _WARP and num_local <= _TILES, "at most 32 ranks, 16 experts per rank")
        splits_We = splits_N.view(size, num_local)
        _demand(bool((splits_We >= 0).all()), "splits are not negative")
        ends = splits_N.cumsum(0)
        _demand(int(ends[-1]) <= len(rows), f"{int(ends[-1])} rows are sent of {len(rows)}")
        got_We, got_MD = _exchange(group_name, rows[: int(ends[-1])], splits_We)
        length_e = got_We.sum(0)
        room_e = ((length_e + align - 1) // align * align).clamp(min=align)
        first_e = room_e.cumsum(0) - room_e
        start_We = first_e + got_We.cumsum(0) - got_We
        last = int((start_We + got_We).max())
        _demand(last <= len(out_RD), f"{last} places are written of {len(out_RD)}")
        parts = got_MD.split(got_We.flatten().tolist())
        for part, start in zip(parts, start_We.flatten().tolist(), strict=True):
            out_RD[start : start + len(part)] = part
        found_2N[0], found_2N[1] = got_We.T.flatten(), start_We.T.flatten()

    def all_to_all_vdev_2d_offset(
        self,
        input: torch.Tensor,
        out: torch.Tensor,
        in_splits_offsets: torch.Tensor,
        out_splits_offsets: torch.Tensor,
        group_name: str,
    ) -> None:
        """Shuffle rows from expert-major to rank-major order, without the gaps."""
        rows, out_SD, found_2N, home_2N = self._checked(
            group_name, input, out, in_splits_offsets, out_splits_offsets
        )
        size = _group(group_name).size()
        _demand(found_2N.dim() == 2 and found_2N.shape[0] == 2, "in_splits_offsets is [2, e * W]")
        _demand(found_2N.shape[1] % size == 0, "its rows are a multiple of the ranks")
        _demand(home_2N.shape == found_2N.shape, "out_splits_offsets has the same shape")
        num_local = found_2N.shape[1] // size
        _demand(size <= _TILES and num_local <= _WARP, "at most 16 ranks, 32 experts per rank")
        splits_We, starts_We = (each.view(num_local, size).T for each in found_2N)
        _demand(bool((splits_We >= 0).all()), "splits are not negative")
        last = int((starts_We + splits_We).max())
        _demand(last <= len(rows), f"{last} places are read of {len(rows)}")
        pairs = zip(starts_We.flatten().tolist(), splits_We.flatten().tolist(), strict=True)
        sent = torch.cat([rows[start : start + count] for start, count in pairs])
        got_We, got_MD = _exchange(group_name, sent, splits_We.contiguous())
        _demand(len(got_MD) <= len(out_SD), f"{len(got_MD)} rows come home to {len(out_SD)}")
        out_SD[: len(got_MD)] = got_MD
        home_2N[0] = got_We.flatten()
        home_2N[1] = home_2N[0].cumsum(0) - home_2N[0]

    def _checked(self, group: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Return the numbers of input, out and two tensors of splits, once all rules hold."""
        self.calls += 1
        rows, out, *splits = inner = [self._unwrap(each) for each in tensors]
        for each in inner:
            _demand((each.data_ptr(), group) in self._met, "all tensors met in the group")
            _demand(each.is_contiguous(), "all tensors are contiguous")
        _demand(rows.dtype == out.dtype, "input and out have one dtype")
        _demand(rows.stride(0) == out.stride(0), "input and out have one stride")
        _demand(all(each.dtype == torch.int64 for each in splits), "splits are int64")
        return inner


@contextlib.contextmanager
def fake_symm_mem(unwrap: Unwrap = lambda tensor: tensor) -> Iterator[SymmMem]:
    """Give this process symmetric memory over the gloo groups that it has."""
    fake = SymmMem(unwrap)
    with pytest.MonkeyPatch.context() as patch:
        patch_symm_mem(patch, fake)
        yield fake


def patch_symm_mem(patch: pytest.MonkeyPatch, fake: SymmMem) -> None:
    """Put what a fake computes in the place of torch's."""
    patch.setattr(memory, "is_nvshmem_available", lambda: True)
    patch.setattr(memory, "get_backend", lambda _: fake.backend)
    for name in ("set_backend", "empty", "rendezvous"):
        patch.setattr(memory, name, getattr(fake, name))
    for name, schema in SCHEMAS.items():
        patch.setattr(torch.ops.symm_mem, name, _Operator(getattr(fake, name), schema))


class _Operator:
    def __init__(self, call: Callable[..., None], schema: str) -> None:
        self._call, self.default = call, SimpleNamespace(_schema=schema)

    def __call__(self, *args: Any, **options: Any) -> None:
        """Run it."""
        self._call(*args, **options)


def _exchange(
    group: str, rows_SD: torch.Tensor, splits_We: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the splits and rows that every rank sends to this one, in rank order."""
    ones = [1] * len(splits_We)
    got_We = _all_to_all(group, splits_We, ones, ones)
    sent, received = splits_We.sum(1).tolist(), got_We.sum(1).tolist()
    return got_We, _all_to_all(group, rows_SD, received, sent)


def _all_to_all(
    group: str, rows: torch.Tensor, received: list[int], sent: list[int]
) -> torch.Tensor:
    handle = _group(group)
    backend = getattr(handle, "_gloo", None) or handle._get_backend(torch.device("cpu"))
    rows = rows.contiguous()
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    backend.alltoall_base(out, rows, received, sent, dist.AllToAllOptions()).wait()
    return out


def _group(name: str) -> Any:
    groups = dist.distributed_c10d._world.pg_names.items()
    return next(group for group, each in groups if each == name)
