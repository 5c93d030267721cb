"""`torch.cuda` of a machine with a GPU for every rank, and what else makes the engine take it.

    with emulated_cuda(guard): ...      in a process of its own: tests/helpers/ranks.py

In place of Triton kernels their torch references run, on the numbers (`fused.py`).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.generation.loop import GenerationLoop
from engine.models import measured_choices
from tests.gpu.emulated import nccl
from tests.gpu.emulated.deep_gemm import emulated_deep_gemm
from tests.gpu.emulated.device import DEVICE, DeviceError
from tests.gpu.emulated.fused import patch_triton
from tests.gpu.emulated.graphs.cuda_graph import patch_graphs
from tests.gpu.emulated.symm_mem import patch_symmetric_memory
from tests.gpu.emulated.tensors import CudaMode, pin

_TOTAL_BYTES = 80 << 30
_FREE_BYTES = 1 << 28  # small: a cache that the engine sizes is allocated


class Event:
    """A point of the stream; it has completed once the host has waited for it or for later work."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._number: int | None = None
        self._is_timed, self._time_s = enable_timing, 0.0

    def record(self, stream: Any = None) -> None:
        """Put the event on the stream."""
        if self._is_timed:
            DEVICE.forbid_in_capture("an event with timing is recorded")
        DEVICE.launch("event", 0)
        DEVICE.events += 1
        self._number, self._time_s = DEVICE.issued, time.perf_counter()

    def synchronize(self) -> None:
        """Let the host wait for the event."""
        if self._number is not None:
            DEVICE.wait("an event", self._number)

    def query(self) -> bool:
        """Return whether the event has completed."""
        DEVICE.forbid_in_capture("an event is queried")
        return self._number is None or self._number <= DEVICE.completed

    def elapsed_time(self, end: Event) -> float:
        """Return the milliseconds to `end`."""
        if not (self._is_timed and end._is_timed):
            raise DeviceError("an event without timing has no time")
        if self._number is None or end._number is None or not (self.query() and end.query()):
            raise DeviceError("elapsed_time of an event that the host has not waited for")
        return (end._time_s - self._time_s) * 1e3


class Stream:
    """The one stream there is."""

    def synchronize(self) -> None:
        """Let the host wait for all work on the stream."""
        DEVICE.wait("a stream")


@dataclass(frozen=True)
class _Properties:
    uuid: str
    major: int = 9  # of an H100
    minor: int = 0


def _other_stream(*_args: Any, **_options: Any) -> Any:
    raise NotImplementedError("the emulation has one stream; teach it the order of several")


@contextlib.contextmanager
def emulated_cuda(guard: Path) -> Iterator[None]:
    """Give this rank an emulated GPU, the one of its LOCAL_RANK.

    guard: the library of `compile_guard`.
    """
    torch.ops.load_library(str(guard))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    DEVICE.reset(torch.device("cuda", local_rank))
    with pytest.MonkeyPatch.context() as patch, CudaMode():
        _patch_cuda(patch, local_rank)
        _patch_groups(patch)
        patch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pin(self))
        patch_triton(patch)
        patch_graphs(patch)
        patch_symmetric_memory(patch)
        patch.setitem(sys.modules, "deep_gemm", emulated_deep_gemm())
        # A mode belongs to one thread; threads read the weights.
        run_thread = threading.Thread.run

        def run(thread: threading.Thread) -> None:
            with CudaMode():
                run_thread(thread)

        patch.setattr(threading.Thread, "run", run)
        run_loop = GenerationLoop.run

        def strictly(*args: Any, **options: Any) -> None:
            with strict():
                run_loop(*args, **options)

        patch.setattr(GenerationLoop, "run", strictly)
        yield
        DEVICE.finish()


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Let the host wait for the device only where the source has a `# SYNC:` comment."""
    DEVICE.is_strict = True
    try:
        yield
    finally:
        DEVICE.is_strict = False


def _patch_cuda(patch: pytest.MonkeyPatch, index: int) -> None:
    answers: dict[str, Any] = {
        "_lazy_init": None,
        "empty_cache": None,
        "is_available": True,
        "is_initialized": True,
        "device_count": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        "current_device": index,
        "get_device_name": "emulated GPU",
        "mem_get_info": (_FREE_BYTES, _TOTAL_BYTES),
        "current_stream": Stream(),
    }
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "Stream", _other_stream)
    patch.setattr(torch.cuda, "stream", _other_stream)
    patch.setattr(torch.cuda, "set_device", _set_device)
    patch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    patch.setattr(torch.cuda, "synchronize", lambda *_: DEVICE.wait("the device"))
    patch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties(f"gpu {device}"))


def _set_device(device: torch.device) -> None:
    if device != DEVICE.device:
        raise DeviceError(f"set_device of {device}, the GPU of another rank")


def _patch_groups(patch: pytest.MonkeyPatch) -> None:
    nccl.register()
    init_process_group, new_group = dist.init_process_group, dist.new_group

    def init(backend: str, device_id: torch.device | None = None, **options: Any) -> None:
        if (backend == "nccl") != (device_id == DEVICE.device):
            raise DeviceError(f"a {backend} group bound to {device_id}")
        init_process_group(nccl.BACKEND if backend == "nccl" else backend, **options)
        if device_id is not None and dist.group.WORLD is not None:
            dist.group.WORLD.bound_device_id = device_id  # of every later group, too

    def new(ranks: Any, backend: str | None = None, **options: Any) -> Any:
        return new_group(ranks, backend=nccl.BACKEND if backend == "nccl" else backend, **options)

    stub = SimpleNamespace(Options=nccl.Options)
    patch.setattr(dist, "ProcessGroupNCCL", stub, raising=False)
    patch.setattr(dist, "init_process_group", init)
    patch.setattr(dist, "new_group", new)
    # Thresholds by the emulation's times would differ from run to run.
    patch.setattr(measured_choices, "measure_link", lambda *_: None)
