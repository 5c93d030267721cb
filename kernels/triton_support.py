"""Whether the Triton kernels (gpu/) take a tensor.

They stand in a folder of their own because a Triton kernel needs `triton` at import: an op imports
its kernel only where Triton is installed and a tensor is on a CUDA device.
"""

import functools
import importlib.util

import torch


def serves(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is on a CUDA device and Triton is installed."""
    return tensor.is_cuda and _installed()


def serves_on(device: torch.device) -> bool:
    """Whether `serves` is true of tensors on a device."""
    return device.type == "cuda" and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
