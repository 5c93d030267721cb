"""`torch.cuda.CUDAGraph` and `torch.cuda.graph` on the emulated device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.gpu.emulated.device import DEVICE, CaptureError
from tests.gpu.emulated.graphs.recorder import Recorder, first_difference
from tests.gpu.emulated.nested import leaves
from tests.gpu.emulated.tensors import CudaTensor

_Pool = tuple[int, int]
_pools = count(1)


class CUDAGraph:
    """A graph: what has been captured, to be run again."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.recorder: Recorder | None = None
        self._pool: _Pool | None = None

    def capture_begin(self, pool: _Pool | None = None, capture_error_mode: str = "global") -> None:
        """Begin a capture."""
        if DEVICE.capture is not None:
            raise CaptureError("a capture begins within another")
        # NCCL's own thread asks for events meanwhile, which ends a capture in this mode.
        if capture_error_mode == "global" and dist.is_initialized():
            raise CaptureError("capture_error_mode = global beside process groups")
        self._pool = pool or graph_pool_handle()
        self.recorder = DEVICE.capture = Recorder()

    def capture_end(self) -> None:
        """End the capture."""
        recorder, DEVICE.capture = DEVICE.capture, None
        if recorder is None:
            raise CaptureError("no capture has begun")
        recorder.end()

    def replay(self) -> None:
        """Run what was captured."""
        if self.recorder is None:
            raise CaptureError("a replay of a graph without a capture")
        if DEVICE.capture is not None:
            raise CaptureError("a replay within a capture")
        DEVICE.launch("graph")
        self.recorder.replay()

    def reset(self) -> None:
        """Drop what was captured."""
        self.recorder = None

    def pool(self) -> _Pool:
        """Return the pool that the graph's memory is of."""
        if self._pool is None:
            raise CaptureError("a graph without a capture has no pool")
        return self._pool


def graph_pool_handle() -> _Pool:
    """Return a new pool."""
    return 0, next(_pools)


@contextlib.contextmanager
def graph(
    cuda_graph: CUDAGraph,
    pool: _Pool | None = None,
    stream: Any = None,
    capture_error_mode: str = "global",
) -> Iterator[None]:
    """Capture what runs within."""
    DEVICE.wait("a capture that begins")
    cuda_graph.capture_begin(pool, capture_error_mode)
    try:
        yield
    except BaseException:
        DEVICE.capture = None
        raise
    cuda_graph.capture_end()


def patch_graphs(patch: pytest.MonkeyPatch) -> None:
    """Let torch.cuda have graphs of the emulated device."""
    patch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    patch.setattr(torch.cuda, "graph", graph)
    patch.setattr(torch.cuda, "graph_pool_handle", graph_pool_handle)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: DEVICE.capture is not None)


def check_replays(run: Callable[[], Any], fills: Sequence[Callable[[], object]]) -> CUDAGraph:
    """Capture a function and compare replays with what it gives eagerly; return the graph.

    Collective where the function is: every rank must call.

    Args:
        run: the function; returns tensors on the device, in lists and tuples or alone.
        fills: each writes other inputs into the memory that `run` reads. The first are those of the
            warm-up and the capture.

    Raises:
        CaptureError: a capture forbids something; or a replay gives other results, or leaves
            other numbers in the memory that it writes to, than `run` does.
    """
    fills[0]()
    run()
    made = CUDAGraph()
    with graph(made, capture_error_mode="thread_local"):
        results = run()
    recorder = made.recorder
    assert recorder is not None
    for number, fill in enumerate(fills):
        fill()
        before = _bytes_of(recorder)
        eager = [*_clones(run()), *_bytes_of(recorder)]
        for outside, value in zip(recorder.written, before, strict=True):
            tensor = outside.tensor()
            if tensor is not None:
                tensor.copy_(value)
        made.replay()
        replayed = [*_clones(results), *_bytes_of(recorder)]
        pairs = list(zip(eager, replayed, strict=False))
        if len(eager) != len(replayed) or not all(_is_same(*pair) for pair in pairs):
            raise CaptureError(f"replay {number} differs from eager: {_why(run, recorder)}")
    return made


def _why(run: Callable[[], Any], recorder: Recorder) -> str:
    """Return what another capture, with the inputs as they are, fixes differently."""
    again = CUDAGraph()
    with graph(again, capture_error_mode="thread_local"):
        run()
    assert again.recorder is not None
    found = first_difference(recorder, again.recorder)
    return found or "both captures are the same, so something is not recorded"


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(_as_bytes(one), _as_bytes(other))


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _clones(results: Any) -> list[torch.Tensor]:
    return [each.inner.clone() for each in leaves((results,)) if isinstance(each, CudaTensor)]


def _bytes_of(recorder: Recorder) -> list[torch.Tensor]:
    """Return what the memory holds that the graph writes to."""
    tensors = [outside.tensor() for outside in recorder.written]
    return [each.clone() for each in tensors if each is not None]
