"""A capture: every operation with its tensors and numbers, and their replay on the same memory.

While it lasts nothing is meant to run. The emulation runs it for the shapes, and at the end sets
the memory that it had from before back to what it held, and fills its own with nonsense, so that a
result which no replay has made is wrong.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tests.gpu.emulated.device import DEVICE, CaptureError, place
from tests.gpu.emulated.nested import leaves, mapped
from tests.gpu.emulated.tensors import CudaTensor, unwrap

_POISON = 0xAB


@dataclass(frozen=True, slots=True)
class Outside:
    """A tensor that was there before the capture: a graph knows its address and keeps it not."""

    storage: weakref.ref[torch.UntypedStorage]
    number: int  # of the storage
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, inner: torch.Tensor) -> Outside:
        """Return what a graph knows of a tensor."""
        storage = inner.untyped_storage()
        offset = int(inner.storage_offset())
        layout = inner.dtype, inner.size(), inner.stride(), offset
        return cls(weakref.ref(storage), storage._cdata, *layout)

    def tensor(self) -> torch.Tensor | None:
        """Return the tensor, None where its memory is gone."""
        storage = self.storage()
        if storage is None:
            return None
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)  # pyright: ignore


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a graph."""

    name: str
    place: str  # file:line that captured it
    run: Callable[..., Any]  # on the numbers
    args: Any  # `Outside` in place of tensors of others
    kwargs: dict[str, Any]
    made: Any  # tensors in memory of the graph, or of its arguments

    def facts(self) -> list[Any]:
        """Return what a graph fixes of the operation, comparable: numbers, shapes, addresses."""
        values = [*leaves(self.args), *leaves(tuple(self.kwargs.values())), *leaves((self.made,))]
        return [self.name, self.place, *map(_fact, values)]


def _fact(value: Any) -> Any:
    if isinstance(value, Outside):
        return value.number, value.dtype, value.size, value.stride, value.offset
    if isinstance(value, torch.Tensor):
        return value.dtype, value.size(), value.stride(), value.storage_offset()
    return value


class Recorder:
    """The operations of one capture."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        # By number; they keep the memory of a graph's pool.
        self._pool: dict[int, torch.UntypedStorage] = {}
        # What memory from before held where the capture has written to it.
        self._before: dict[int, tuple[Outside, torch.UntypedStorage]] = {}
        self._claims = {id(claim) for claim in DEVICE.claims}

    @property
    def written(self) -> list[Outside]:
        """The memory from before that a replay writes to."""
        return [outside for outside, _ in self._before.values()]

    def own(
        self, name: str, run: Callable[..., Any], args: Any, made: Any, kwargs: dict[str, Any]
    ) -> None:
        """Take memory that an operation has allocated into the pool. Arguments as of `record`."""
        given = {_number(each) for each in _tensors((args, tuple(kwargs.values())))}
        for each in _tensors((made,)):
            if _number(each) not in given | self._before.keys():
                self._pool[_number(each)] = unwrap(each).untyped_storage()

    def before_write(self, inner: torch.Tensor) -> None:
        """Note what memory holds that is about to be written to."""
        number = _number(inner)
        if number not in self._pool and number not in self._before:
            whole = _bytes(inner.untyped_storage())
            self._before[number] = Outside.of(whole), inner.untyped_storage().clone()

    def record(
        self,
        name: str,
        run: Callable[..., Any],
        args: Any,
        made: Any,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Record an operation that has run, unless it is part of a kernel: that is recorded whole.

        Args:
            name: of the operation.
            run: runs it on the numbers of `args` and `kwargs`, as a replay does.
            args: its arguments, emulated tensors among them.
            made: its results.
            kwargs: its named arguments.
        """
        kwargs = kwargs or {}
        self.own(name, run, args, made, kwargs)
        if DEVICE.is_in_kernel:
            return
        frozen = {key: mapped(self._frozen, value) for key, value in kwargs.items()}
        args, made = mapped(self._frozen, args), mapped(unwrap, made)
        self.operations.append(Operation(name, place(), run, args, frozen, made))

    def _frozen(self, value: Any) -> Any:
        if isinstance(value, CudaTensor):
            return value.inner if _number(value) in self._pool else Outside.of(value.inner)
        return value.clone() if isinstance(value, torch.Tensor) else value

    def end(self) -> None:
        """Set memory from before the capture back to what it held, and spoil the pool's.

        Raises:
            CaptureError: a collective of the capture has not been waited for in it.
        """
        for claim in DEVICE.claims:
            if id(claim) not in self._claims:
                raise CaptureError(f"{claim.what} was not waited for in the capture")
        self.restore()
        for storage in self._pool.values():
            _bytes(storage).fill_(_POISON)

    def restore(self) -> None:
        """Set memory from before the capture back to what it held then."""
        for outside, before in self._before.values():
            storage = outside.storage()
            if storage is not None:
                storage.copy_(before)

    def replay(self) -> None:
        """Run the operations again, on the same memory with the same numbers.

        Raises:
            CaptureError: memory of others is gone, or a result's shape depends on values.
        """
        with torch.inference_mode(False), torch.no_grad():
            for each in self.operations:
                self._run(each)

    def _run(self, operation: Operation) -> None:
        def thawed(value: Any) -> Any:
            if not isinstance(value, Outside):
                return value
            tensor = value.tensor()
            if tensor is None:
                raise CaptureError(
                    f"{operation.place}: {operation.name} of a tensor {list(value.size)} from "
                    "before the capture, whose memory is gone"
                )
            DEVICE.check(tensor, value.number in self._before, f"a replay of {operation.name}")
            return tensor

        kwargs = {key: mapped(thawed, value) for key, value in operation.kwargs.items()}
        made = operation.run(*mapped(thawed, operation.args), **kwargs)
        for to, value in zip(leaves((operation.made,)), leaves((made,)), strict=True):
            if not isinstance(to, torch.Tensor):
                continue
            value = unwrap(value)
            if to.shape != value.shape:
                raise CaptureError(
                    f"{operation.place}: {operation.name} has a result of {list(to.shape)} in the "
                    f"capture and of {list(value.shape)} in a replay"
                )
            if _number(to) != _number(value):
                to.copy_(value)


def first_difference(one: Recorder, other: Recorder) -> str | None:
    """Return what two captures of a function fix differently, with its line; None for nothing."""
    for first, second in zip(one.operations, other.operations, strict=False):
        facts, others = first.facts(), second.facts()
        if facts != others:
            pairs = zip(facts, others, strict=False)
            what = next((f"{a} and {b}" for a, b in pairs if a != b), "more arguments")
            return f"{first.place}: {first.name} is captured with {what}"
    if len(one.operations) != len(other.operations):
        return f"{len(one.operations)} operations and {len(other.operations)} are captured"
    return None


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportArgumentType]


def _number(tensor: torch.Tensor) -> int:
    return unwrap(tensor).untyped_storage()._cdata


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (each for each in leaves(values) if isinstance(each, torch.Tensor))
