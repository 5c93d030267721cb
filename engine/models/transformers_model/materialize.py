"""Materialize: memory on a device for a model that was built on the meta device."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn


def materialize(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Give every tensor on the meta device memory, in place, its weights uninitialised.

    Tensors that are one stay one. Buffers that no checkpoint has are computed by transformers.

    Args:
        model: of transformers.
        device: of the tensors; meta: nothing is done.
        dtype: of the model, for the tensors that transformers keeps in float32.
    """
    if device.type == "meta":
        return
    wide = _kept_wide(model, dtype)
    made: dict[int, nn.Parameter] = {}
    computed: dict[int, nn.Module] = {}  # modules with buffers that no checkpoint has
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                kind = torch.float32 if wide.search(_join(path, name)) else parameter.dtype
                memory = torch.empty(parameter.shape, dtype=kind, device=device)
                made[id(parameter)] = nn.Parameter(memory, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is None or not buffer.is_meta:
                continue
            is_wide = buffer.is_floating_point() and wide.search(_join(path, name))
            kind = torch.float32 if is_wide else buffer.dtype
            module._buffers[name] = torch.zeros(buffer.shape, dtype=kind, device=device)
            if name in module._non_persistent_buffers_set:
                computed[id(module)] = module
    with torch.no_grad():
        for module in computed.values():
            model._init_weights(module)


def _kept_wide(model: Any, dtype: torch.dtype) -> re.Pattern[str]:
    """Return what matches the names of tensors that transformers keeps in float32."""
    names = [re.escape(name) for name in model._get_dtype_plan(dtype)]
    return re.compile(rf"(^|\.)({'|'.join(names)})(\.|$)" if names else r"(?!)")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
