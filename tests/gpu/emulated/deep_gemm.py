"""DeepGEMM on the emulated device: the in-process form, one launch per product."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from tests.gpu.emulated.device import DEVICE, DeviceError, place
from tests.gpu.emulated.tensors import CudaTensor, leaves, unwrap
from tests.helpers.fake_deep_gemm import fake_module

_PRODUCTS = ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked")


def emulated_deep_gemm() -> ModuleType:
    """Return what `import deep_gemm` is to find in sys.modules."""
    module = fake_module()
    for name in _PRODUCTS:
        setattr(module, name, _on_device(name, getattr(module, name)))
    return module


def _on_device(name: str, product: Callable[..., None]) -> Callable[..., None]:
    def launch(*args: Any) -> None:
        for number, each in enumerate(leaves(args)):
            if not isinstance(each, torch.Tensor):
                continue
            if not isinstance(each, CudaTensor):
                raise DeviceError(f"{place()}: tensor {number} of {name} is a CPU tensor")
            DEVICE.check(each.inner, each is args[2], name)
        with torch.inference_mode(False), torch.no_grad():
            product(*(_unwrapped(each) for each in args))
        DEVICE.launch(f"deep_gemm {name}")

    return launch


def _unwrapped(value: Any) -> Any:
    return tuple(map(unwrap, value)) if isinstance(value, tuple) else unwrap(value)
