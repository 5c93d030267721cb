"""The emulated GPU of this process: its stream, what is in flight, and what was counted.

Device work is computed at once, by the CPU. What a real device would still have to do is kept as
numbers of the stream: a copy or an event has completed once the host has waited for its number,
never before. So a result that is used without waiting is wrong every time.
"""

from __future__ import annotations

import linecache
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

_OWN = os.path.dirname(__file__)
_MODULES = ("cuda", "deep_gemm", "device", "fused", "nccl", "nested", "scaled_mm", "symm_mem")
_MODULES += ("tensors", "graphs/cuda_graph", "graphs/recorder")
_EMULATOR = {os.path.join(_OWN, f"{name}.py") for name in _MODULES}
_TORCH = os.path.dirname(torch.__file__)
# A `# SYNC:` comment stands on the line that waits or so many lines above its end.
_COMMENT_LINES = 4


class DeviceError(RuntimeError):
    """Something that CUDA or NCCL would refuse, or compute wrongly without a sign of it."""


class RaceError(DeviceError):
    """Memory is used while a copy or a collective still uses it."""


class HostSyncError(DeviceError):
    """The host waits for the device where the source has no `# SYNC:` comment."""


class CaptureError(DeviceError):
    """Something that the capture of a CUDA graph forbids, or that a replay would do wrongly."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Memory that a collective in flight reads or writes."""

    tensor: torch.Tensor  # kept, so that its memory is not used again
    writes: bool
    what: str


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy between pinned memory and the device that has not run yet."""

    number: int  # of the stream
    finish: Callable[[], object]


@dataclass
class Device:
    """One emulated GPU with one stream."""

    device: torch.device = torch.device("cuda", 0)
    issued: int = 0  # work on the stream
    completed: int = 0  # of it, as far as the host knows
    claims: list[Claim] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    is_in_kernel: bool = False  # what runs is part of one kernel
    is_strict: bool = False  # the host waits only where the source says so
    capture: Any = None  # the `Recorder` of the graph that is captured
    warm: set[str] = field(default_factory=set)  # what has run once and is loaded
    kernels: Counter[str] = field(default_factory=Counter)  # by op
    lines: Counter[str] = field(default_factory=Counter)  # kernels by line of the source
    syncs: Counter[str] = field(default_factory=Counter)  # by kind and line
    collectives: Counter[str] = field(default_factory=Counter)  # by name
    events: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def launch(self, name: str, kernels: int = 1) -> None:
        """Put work of so many kernels on the stream."""
        if self.is_in_kernel:
            return
        self.issued += 1
        if kernels:
            self.kernels[name] += kernels
            self.lines[place()] += kernels

    def wait(self, what: str, number: int | None = None) -> None:
        """Let the host wait for the stream, up to work `number`, by default to its end.

        Raises:
            HostSyncError: the line that waits has no `# SYNC:` comment.
            CaptureError: a graph is captured.
        """
        if self.is_in_kernel:
            return
        self.forbid_in_capture(f"the host waits ({what})")
        caller = _caller()
        self.syncs[f"{what} @ {caller}"] += 1
        if self.is_strict and not caller.may_wait():
            raise HostSyncError(f"{caller}: the host waits ({what}) without a # SYNC: comment")
        with self.lock:  # threads that read weights wait, too
            self.completed = max(self.completed, self.issued if number is None else number)
            due = [copy for copy in self.copies if copy.number <= self.completed]
            self.copies = [copy for copy in self.copies if copy.number > self.completed]
            for copy in due:
                copy.finish()

    def forbid_in_capture(self, what: str) -> None:
        """Raise `CaptureError` where a graph is captured."""
        if self.capture is not None and not self.is_in_kernel:
            raise CaptureError(f"{place()}: {what} in a capture")

    def load(self, what: str) -> None:
        """Note that something runs which its first run loads or connects: outside a capture."""
        if what not in self.warm:
            self.forbid_in_capture(f"{what} runs for the first time")
            self.warm.add(what)

    @contextmanager
    def one_kernel(self) -> Iterator[None]:
        """Count nothing: what runs within is one kernel, which its caller launches."""
        self.is_in_kernel = True
        try:
            yield
        finally:
            self.is_in_kernel = False

    def check(self, tensor: torch.Tensor, writes: bool, what: str) -> None:
        """Raise `RaceError` where a collective in flight uses this memory."""
        if not self.claims or not tensor.numel():
            return
        low, high = _span(tensor)
        for claim in self.claims:
            first, last = _span(claim.tensor)
            if low < last and first < high and (writes or claim.writes):
                verb = "writes" if writes else "reads"
                raise RaceError(f"{place()}: {what} {verb} memory of {claim.what}, in flight")

    def reset(self, device: torch.device) -> None:
        """Become another device, with nothing in flight."""
        self.device, self.is_strict, self.claims, self.copies = device, False, [], []
        self.capture, self.warm = None, set()
        self.reset_counts()

    def finish(self) -> None:
        """Wait for all work, and raise where a collective has never been waited for."""
        self.wait("the end")
        if self.claims:
            raise RaceError(f"{self.claims[0].what} was never waited for")

    def reset_counts(self) -> None:
        """Forget what was counted so far."""
        for counter in (self.kernels, self.lines, self.syncs, self.collectives):
            counter.clear()
        self.events = 0


DEVICE = Device()


@dataclass(frozen=True, slots=True)
class _Caller:
    """The innermost frame outside torch and the emulator."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"

    def may_wait(self) -> bool:
        """Return whether the source says that the host waits here."""
        lines = range(self.line - _COMMENT_LINES, self.line + 1)
        return any("# SYNC:" in linecache.getline(self.path, number) for number in lines)


def place() -> str:
    """Return file:line of the innermost frame outside torch and the emulator."""
    return str(_caller())


def _caller() -> _Caller:
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path not in _EMULATOR and not path.startswith((_TORCH, "<")):
            return _Caller(os.path.relpath(path), frame.f_lineno)
        frame = frame.f_back
    return _Caller("?", 0)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    low = tensor.data_ptr()
    steps = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return low, low + (steps + 1) * tensor.element_size()
