"""Symmetric memory on the emulated device: the in-process form, two launches per exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu.emulated.device import DEVICE, DeviceError, place
from tests.gpu.emulated.tensors import CudaTensor, unwrap
from tests.helpers.fake_symm_mem import SCHEMAS, SymmMem, patch_symm_mem

_WRITTEN = (1, 3)  # arguments: out, and the splits and offsets of what arrived


def patch_symmetric_memory(patch: pytest.MonkeyPatch) -> None:
    """Give the device symmetric memory, whose numbers travel over gloo."""
    fake = SymmMem(unwrap)
    for name in SCHEMAS:
        setattr(fake, name, _on_device(name, getattr(fake, name)))
    patch_symm_mem(patch, fake)


def _on_device(name: str, exchange: Callable[..., None]) -> Callable[..., None]:
    def launch(*args: Any, **options: Any) -> None:
        for number, each in enumerate(args):
            if not isinstance(each, torch.Tensor):
                continue
            if not isinstance(each, CudaTensor):
                raise DeviceError(f"{place()}: tensor {number} of {name} is a CPU tensor")
            DEVICE.check(each.inner, number in _WRITTEN, name)
        DEVICE.collectives[name] += 1
        with torch.inference_mode(False), torch.no_grad():
            exchange(*args, **options)
        DEVICE.launch(f"symm_mem {name}", 2)  # the splits, then the rows

    return launch
