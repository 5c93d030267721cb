"""Tensors that are on cuda and hold their numbers in host memory.

Every op of torch comes through `dispatch`: by the class, which sees ops with such a tensor, and by
the mode, which also sees those that make one. It refuses what CUDA would refuse, notes what CUDA
would do later, and runs the op on the numbers.

Kernels are counted by a rule, not measured: `KERNELS` has the ops that launch more than one, a view
launches none, and neither does an op without elements. A copy to the device counts as one, a copy
to the host as a sync.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tests.gpu.emulated.device import DEVICE, Copy, DeviceError, RaceError, place
from tests.gpu.emulated.nested import leaves, mapped
from tests.gpu.emulated.scaled_mm import scaled_grouped_mm

KERNELS = {
    "sort": 5,
    "argsort": 5,
    "topk": 3,
    "cumsum": 2,
    "index_put": 2,
    "repeat_interleave": 3,
    "_grouped_mm": 2,  # the second works out its groups
    "_scaled_grouped_mm": 2,
}
# Ops that torch has for CUDA alone.
_CPU_FORMS: dict[str, Callable[..., Any]] = {"_scaled_grouped_mm": scaled_grouped_mm}
_NO_KERNEL = {"_unsafe_view", "resize_", "set_", "_local_scalar_dense"}
# The size of their result depends on values, which the host has to read.
_SYNCING = {"nonzero", "masked_select", "_unique2", "bincount", "equal", "multinomial"}
_INDEXING = {"index", "index_put", "_index_put_impl"}
_POISON = 0xAB

_pinned: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()


class CudaTensor(torch.Tensor):
    """A tensor on the emulated device."""

    inner: torch.Tensor  # the numbers, on the CPU
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> CudaTensor:
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=DEVICE.device,
            )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op that has an emulated tensor."""
        return dispatch(func, args, kwargs or {})

    def data_ptr(self) -> int:
        """Return the address of the numbers."""
        return self.inner.data_ptr()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse, as CUDA does."""
        raise TypeError("a tensor on cuda cannot become a numpy array; copy it to the host first")

    def tolist(self) -> Any:
        """Return the numbers as lists; the host waits for them."""
        return self.cpu().tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return f"CudaTensor({self.inner!r})"


class CudaMode(TorchDispatchMode):
    """Within it an op with the device cuda makes emulated tensors. Of one thread."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and importing dynamo takes longer than a job

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an op, whatever tensors it has."""
        return dispatch(func, args, kwargs or {}, self)


def unwrap(value: Any) -> Any:
    """Return the numbers of an emulated tensor, anything else itself."""
    return value.inner if isinstance(value, CudaTensor) else value


def pin(host: torch.Tensor) -> torch.Tensor:
    """Return a copy of `host` in pinned memory."""
    if isinstance(host, CudaTensor):
        raise DeviceError(f"{place()}: only memory of the host can be pinned")
    DEVICE.forbid_in_capture("memory is pinned")
    with _disable_current_modes(), torch.inference_mode(False):
        copy = host.clone()
    _pinned.add(copy.untyped_storage())
    return copy


def dispatch(func: Any, args: Any, kwargs: Any, mode: CudaMode | None = None) -> Any:
    """Run one op of torch as the emulated device would."""
    flat = [*leaves(args), *leaves(tuple(kwargs.values()))]
    cuda = [each for each in flat if isinstance(each, CudaTensor)]
    target = next((each for each in flat if isinstance(each, torch.device)), None)
    if not cuda and (target is None or target.type != "cuda"):
        return _on_the_host(func, args, kwargs)
    # Inference mode leaves ops that are made of others whole.
    if func.namespace == "aten" and func._can_decompose():
        with mode or contextlib.nullcontext():
            return func.decompose(*args, **kwargs)
    with DEVICE.lock, torch.inference_mode(False), torch.no_grad():
        return _run(func, args, kwargs, flat, cuda, target)


def _on_the_host(func: Any, args: Any, kwargs: Any) -> Any:
    if not kwargs.get("pin_memory"):
        return func(*args, **kwargs)
    made = func(*args, **{**kwargs, "pin_memory": False})
    _pinned.add(made.untyped_storage())
    return made


def _run(
    func: Any,
    args: Any,
    kwargs: dict[str, Any],
    flat: list[Any],
    cuda: list[CudaTensor],
    target: torch.device | None,
) -> Any:
    name = func._schema.name.split("::")[1]
    base = name.rstrip("_")
    if target is not None and target.type == "cuda":
        if target.index not in (None, DEVICE.device.index):
            raise DeviceError(f"{place()}: {name} on {target}, the GPU of another rank")
    if name == "copy_":
        return _copy(args[0], args[1], any(args[2:]) or bool(kwargs.get("non_blocking")))
    if name == "_to_copy":
        return _to_copy(func, args[0], dict(kwargs), target)
    if name == "_local_scalar_dense" or base in _SYNCING:
        DEVICE.wait(name)
    _check_devices(func, base, args, kwargs, flat)
    is_view = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
    is_view |= name in _NO_KERNEL or name.startswith(("empty", "new_empty"))
    makes_one_like_it = name.startswith("new_") or name.endswith("_like")
    is_checked = DEVICE.claims or DEVICE.capture is not None
    if is_checked and not is_view and not makes_one_like_it:
        _check_races(func, name, args, kwargs)
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    named = {key: mapped(unwrap, value) for key, value in kwargs.items()}
    run = _CPU_FORMS.get(name, func)
    made = run(*mapped(unwrap, args), **named)
    if DEVICE.capture is not None:
        take = DEVICE.capture.own if is_view else DEVICE.capture.record
        take(name, run, args, made, kwargs)
    if not is_view:
        is_empty = any(isinstance(e, torch.Tensor) and not e.numel() for e in leaves((made,)))
        DEVICE.launch(name, 0 if is_empty else KERNELS.get(base, 1))
    known = {id(each.inner): each for each in cuda}
    return mapped(lambda each: _wrap(each, known), made)


def _wrap(made: Any, known: dict[int, CudaTensor]) -> Any:
    if not isinstance(made, torch.Tensor):
        return made
    found = known.get(id(made))
    return CudaTensor(made) if found is None else found


def _check_devices(func: Any, base: str, args: Any, kwargs: Any, flat: list[Any]) -> None:
    """Refuse tensors of the host beside emulated ones; numbers and indices make the host wait."""
    for each in flat:
        if not isinstance(each, torch.Tensor) or isinstance(each, CudaTensor) or not each.dim():
            continue
        if base not in _INDEXING:
            shape = list(each.shape)
            raise DeviceError(f"{place()}: {func} of a CPU tensor {shape} and one on cuda")
        DEVICE.wait("an index on the host")
    if base in _INDEXING and any(each is not None and _is_mask(each) for each in args[1]):
        DEVICE.wait("an index by a mask")
    if base == "repeat_interleave" and kwargs.get("output_size") is None:
        DEVICE.wait("repeat_interleave without output_size")


def _is_mask(index: torch.Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _check_races(func: Any, name: str, args: Any, kwargs: Any) -> None:
    declared = func._schema.arguments
    values = [*zip(declared, args, strict=False)]
    values += [(each, kwargs[each.name]) for each in declared if each.name in kwargs]
    for argument, value in values:
        writes = bool(argument.alias_info and argument.alias_info.is_write)
        for each in leaves((value,)):
            if isinstance(each, CudaTensor):
                _check(each, writes, name)


def _check(tensor: CudaTensor, writes: bool, name: str) -> None:
    DEVICE.check(tensor.inner, writes, name)
    if writes and DEVICE.capture is not None:
        DEVICE.capture.before_write(tensor.inner)


def _copy(to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
    for tensor, writes in ((to, True), (source, False)):
        if isinstance(tensor, CudaTensor):
            _check(tensor, writes, "copy_")
    if not isinstance(to, CudaTensor):
        _to_host(to, unwrap(source), non_blocking)
        return to
    to.inner.copy_(unwrap(source))
    if isinstance(source, CudaTensor) or not source.dim():
        DEVICE.launch("copy_", int(to.numel() > 0))
        if not isinstance(source, CudaTensor):
            DEVICE.forbid_in_capture("a copy from the host")
        if DEVICE.capture is not None:
            DEVICE.capture.record("copy_", torch.Tensor.copy_, (to, source), to)
    else:
        _to_device(source, non_blocking)
    return to


def _to_copy(func: Any, source: torch.Tensor, kwargs: Any, target: torch.device | None) -> Any:
    non_blocking = bool(kwargs.get("non_blocking"))
    to_cuda = isinstance(source, CudaTensor) if target is None else target.type == "cuda"
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    made = func(unwrap(source), **{**kwargs, "non_blocking": False})
    if not isinstance(source, CudaTensor):
        _to_device(source, non_blocking)
        return CudaTensor(made)
    DEVICE.check(source.inner, False, "to")
    if to_cuda:
        DEVICE.launch("_to_copy", int(made.numel() > 0))
        if DEVICE.capture is not None:
            DEVICE.capture.record("_to_copy", func, (source,), made, kwargs)
        return CudaTensor(made)
    # torch takes pinned memory for a result that it does not wait for.
    if non_blocking:
        _pinned.add(made.untyped_storage())
    _to_host(made, made.clone(), non_blocking)
    return made


def _to_host(to: torch.Tensor, value: torch.Tensor, non_blocking: bool) -> None:
    """Copy to the host, which waits, or finds nonsense in pinned memory before the copy ran."""
    DEVICE.forbid_in_capture("a copy to the host")
    DEVICE.launch("copy to the host", 0)
    if not (non_blocking and to.untyped_storage() in _pinned):
        DEVICE.wait("a copy to the host")
        to.copy_(value)
        return
    value = value.to(to.dtype, copy=True)
    to.view(torch.uint8).fill_(_POISON)
    DEVICE.copies.append(Copy(DEVICE.issued, lambda: to.copy_(value)))


def _to_device(host: torch.Tensor, non_blocking: bool) -> None:
    """Note a copy from the host, which waits, or leaves pinned memory as it is until it ran."""
    DEVICE.launch("copy to the device", int(host.numel() > 0))
    if not host.numel():
        return
    DEVICE.forbid_in_capture("a copy from the host")
    if not (non_blocking and host.untyped_storage() in _pinned):
        DEVICE.wait("a copy from pageable memory")
        return
    before, where = host.clone(), place()

    def finish() -> None:
        if not torch.equal(_bytes(host), _bytes(before)):
            raise RaceError(f"{where}: pinned memory was written before its copy had run")

    DEVICE.copies.append(Copy(DEVICE.issued, finish))


def _bytes(host: torch.Tensor) -> torch.Tensor:
    return host.contiguous().view(-1).view(torch.uint8)
