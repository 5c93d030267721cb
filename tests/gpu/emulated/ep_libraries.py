"""DeepEP and Transformer Engine's EP on the emulated device: the in-process forms, over gloo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.cuda import nccl as torch_nccl

from tests.gpu.emulated.device import DEVICE, DeviceError, place
from tests.gpu.emulated.nested import leaves, mapped
from tests.gpu.emulated.tensors import CudaTensor, unwrap
from tests.helpers import fake_deep_ep, fake_te_ep

_NCCL = (2, 30, 7)


class _Buffer(fake_deep_ep.Buffer):
    """DeepEP's buffers, between emulated GPUs."""

    def __init__(self, group: Any, *args: Any, **options: Any) -> None:
        super().__init__(_host_group(group), *args, **options)


def _host_group(group: Any) -> Any:
    """Return the gloo group under an emulated NCCL group."""
    return group._gloo


def _on_device(name: str, call: Callable[..., Any], kernels: int, num_self: int) -> Any:
    def launch(*args: Any, **options: Any) -> Any:
        given = [*leaves(args[num_self:]), *leaves(tuple(options.values()))]
        for number, each in enumerate(given):
            if not isinstance(each, torch.Tensor):
                continue
            if not isinstance(each, CudaTensor):
                raise DeviceError(f"{place()}: tensor {number} of {name} is a CPU tensor")
            DEVICE.check(each.inner, False, name)
        with torch.inference_mode(False), torch.no_grad():
            plain = [mapped(unwrap, each) for each in args]
            result = call(*plain, **{key: mapped(unwrap, each) for key, each in options.items()})
        DEVICE.launch(name, kernels)
        return mapped(_placed, result)

    return launch


def _placed(value: Any) -> Any:
    return CudaTensor(value) if isinstance(value, torch.Tensor) else value


def patch_libraries(patch: pytest.MonkeyPatch) -> None:
    """Put both libraries where they are imported from, on a GPU and an NCCL that serve them."""
    kernels = {
        "get_dispatch_layout": 1,
        "dispatch": 2,
        "combine": 2,
        "clean_low_latency_buffer": 1,
        "low_latency_dispatch": 1,
        "low_latency_combine": 1,
    }
    for name, count in kernels.items():
        call = getattr(fake_deep_ep.Buffer, name)
        patch.setattr(_Buffer, name, _on_device(f"deep_ep {name}", call, count, 1), raising=False)
    module = fake_deep_ep.fake_module()
    patch.setattr(module, "Buffer", _Buffer)
    patch.setitem(sys.modules, "deep_ep", module)
    modules = fake_te_ep.fake_modules()
    ep: Any = modules["transformer_engine.pytorch.ep"]
    bootstrap = ep.ep_bootstrap
    ep.ep_bootstrap = lambda group, **options: bootstrap(_host_group(group), **options)
    ep.ep_dispatch = _on_device("te_ep dispatch", ep.ep_dispatch, 3, 0)
    ep.ep_combine = _on_device("te_ep combine", ep.ep_combine, 1, 0)
    for name, each in modules.items():
        patch.setitem(sys.modules, name, each)
    patch.setattr(torch_nccl, "version", lambda: _NCCL)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
