"""NCCL groups over gloo: the numbers of emulated tensors travel as those of CPU tensors do.

A group refuses what NCCL refuses. What it reads and writes is claimed until the collective has been
waited for, by the stream as by the host.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from tests.gpu.emulated.device import DEVICE, CaptureError, Claim, DeviceError, place
from tests.gpu.emulated.tensors import CudaTensor, unwrap

BACKEND = "emulated_nccl"
_DTYPES = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}


class _Work(dist.Work):
    """A collective in flight."""

    def __init__(self, work: dist.Work, claims: list[Claim]) -> None:
        super().__init__()
        self._work, self._claims, self._capture = work, claims, DEVICE.capture

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Let the stream wait for the result, not the host."""
        if DEVICE.capture is not self._capture:
            what = self._claims[0].what
            raise CaptureError(f"{place()}: {what} is waited for on the other side of a capture")
        self._work.wait()
        mine = {id(claim) for claim in self._claims}
        DEVICE.claims = [claim for claim in DEVICE.claims if id(claim) not in mine]
        return True


class Options:
    """In place of `ProcessGroupNCCL.Options`."""

    def __init__(self, is_high_priority_stream: bool = False) -> None:
        self.is_high_priority_stream = is_high_priority_stream


class NcclGroup(dist.ProcessGroup):
    """The collectives that torch.distributed calls, for emulated tensors.

    Its methods have the names and arguments of torch's own process groups.
    """

    def __init__(self, opts: Any, options: Options | None) -> None:
        super().__init__(opts.group_rank, opts.group_size)  # pyright: ignore[reportCallIssue]: no stub
        if opts.group_size == 1 and dist.is_initialized():
            raise DeviceError("an NCCL communicator for a group of one rank")
        self.is_high_priority = options is not None and options.is_high_priority_stream
        # Any: torch's stubs lack its methods.
        self._gloo: Any = dist.ProcessGroupGloo(
            opts.store, opts.group_rank, opts.group_size, timeout=opts.timeout
        )
        self._rank, self._size = opts.group_rank, opts.group_size

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cuda")]  # objects of the host are sent from here

    @property
    def group_name(self) -> str:
        """The name by which torch registers the group."""
        return dist.distributed_c10d._world.pg_names[self]

    supports_splitting = False

    def _get_backend(self, device: torch.device) -> NcclGroup:
        return self

    def getBackendName(self) -> str:
        """Return the name under which the backend is registered."""
        return BACKEND

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def rank(self) -> int:
        """Return this rank within the group."""
        return self._rank

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = None,
    ) -> dist.Work:
        """Send rows to every rank."""
        opts = opts or dist.AllToAllOptions()

        def start(parts: list[torch.Tensor]) -> dist.Work:
            return self._gloo.alltoall_base(*parts, output_splits, input_splits, opts)

        return self._start("all_to_all", [output, input], 1, start)

    def all_gather_single(
        self, output: torch.Tensor, input: torch.Tensor, opts: Any = None
    ) -> dist.Work:
        """Gather every rank's `input` in rank order."""
        opts = opts or AllgatherOptions()

        def start(parts: list[torch.Tensor]) -> dist.Work:
            return self._gloo._allgather_base(*parts, opts)

        return self._start("all_gather", [output, input], 1, start)

    def allgather(
        self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None
    ) -> dist.Work:
        """Gather every rank's tensor into a list."""
        opts = opts or AllgatherOptions()

        def start(parts: list[torch.Tensor]) -> dist.Work:
            return self._gloo.allgather([parts[:-1]], parts[-1:], opts)

        return self._start("all_gather", [*outputs[0], *inputs], len(outputs[0]), start)

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        """Reduce in place."""
        opts = opts or dist.AllreduceOptions()
        return self._start(
            "all_reduce", tensors, 1, lambda parts: self._gloo.allreduce(parts, opts)
        )

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> dist.Work:
        """Copy the root's tensor to every rank."""
        opts = opts or dist.BroadcastOptions()
        return self._start("broadcast", tensors, 1, lambda parts: self._gloo.broadcast(parts, opts))

    def barrier(self, opts: Any = None) -> dist.Work:
        """Wait until every rank has reached the barrier."""
        DEVICE.wait("a barrier")
        return self._gloo.barrier(dist.BarrierOptions())

    def shutdown(self) -> None:
        """Leave the group."""

    abort = shutdown

    # Their names before torch 2.13.
    alltoall_base = all_to_all_single  # pyright: ignore[reportAssignmentType]: names differ
    _allgather_base = all_gather_single

    def _start(
        self,
        name: str,
        tensors: list[torch.Tensor],
        num_written: int,
        start: Callable[[list[torch.Tensor]], dist.Work],
    ) -> dist.Work:
        """Start a collective on tensors, of which it writes the first `num_written`."""
        for number, tensor in enumerate(tensors):
            _check(name, tensor)
            DEVICE.check(unwrap(tensor), number < num_written, name)
        DEVICE.load(f"the communicator {id(self)}")
        DEVICE.launch("collective")
        DEVICE.collectives[name] += 1
        if DEVICE.capture is not None:
            for tensor in tensors[:num_written]:
                DEVICE.capture.before_write(unwrap(tensor))
            DEVICE.capture.record(name, lambda *parts: _run_to_end(start, parts), tensors, None)
        parts = [unwrap(tensor) for tensor in tensors]
        what = f"{name} from {place()}"
        claims = [Claim(part, number < num_written, what) for number, part in enumerate(parts)]
        work = start(parts)
        DEVICE.claims = [*DEVICE.claims, *claims]
        return _Work(work, claims)


def _run_to_end(
    start: Callable[[list[torch.Tensor]], dist.Work], parts: tuple[torch.Tensor, ...]
) -> None:
    start(list(parts)).wait()


def _check(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that NCCL refuses."""
    about = f"{place()}: {name} of {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if not isinstance(tensor, CudaTensor):
        raise DeviceError(f"{about}: a CPU tensor in an NCCL group")
    if not tensor.is_contiguous():
        raise DeviceError(f"{about}: NCCL takes contiguous tensors, this has {tensor.stride()}")
    if tensor.dtype not in _DTYPES:
        raise DeviceError(f"{about}: NCCL has no such dtype")


def register() -> None:
    """Make the backend known to torch.distributed, once per process."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, NcclGroup, extended_api=True, devices=["cuda"])
