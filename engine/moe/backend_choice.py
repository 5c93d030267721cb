"""Which experts backend runs: what moe.experts.backend means on a device, and what it needs.

`experts.py` holds the backends, `experts_trial.py` measures whether `te` is faster than what `auto`
would take.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from engine.ops import deep_gemm_library, triton_support

logger = logging.getLogger(__name__)

_GROUPED_MM_ALIGNMENT = 16  # bytes: torch checks the strides of its operands
# Compute capabilities whose kernel reads the offsets on the device; torch's fallback for others,
# and for other dtypes than bfloat16, copies them to the host and loops over the experts.
_GROUPED_MM_MAJORS = (9, 10)
# torch's product of FP8 with a scale per row and output: its kernel is built for Hopper.
_SCALED_MM_MAJOR = 9
_SCALED_MM_MULTIPLE = 16  # of all dims
# On Hopper DeepGEMM takes float32 scales. On SM100 it takes powers of two alone, packed, which the
# scales of most checkpoints are not.
_DEEP_GEMM_MAJOR = 9
_DEEP_GEMM_MULTIPLE = 128  # of all dims: blocks are whole


def find_grouped_mm() -> Callable[..., torch.Tensor] | None:
    """Return torch's grouped matrix product: public from torch 2.10 on, private in 2.8 and 2.9."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def import_transformer_engine() -> Any:
    """Import Transformer Engine's torch module.

    Raises:
        ValueError: it is not installed, or its import fails; the text names what to do.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            "moe.experts.backend: 'te' needs Transformer Engine, which is not installed; install "
            "lockstep-moe[te] or lockstep-moe[te13], or choose 'grouped_mm' or 'torch'"
        )
    try:
        import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
    except Exception as error:  # a release for another torch or CUDA fails in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"moe.experts.backend: 'te' needs Transformer Engine, whose import fails: {reason}; "
            "install the release that fits this torch and CUDA, or choose 'grouped_mm' or 'torch'"
        ) from error
    return te


def choose_backend(
    name: str, device: torch.device, dtype: torch.dtype, widths: Sequence[int] = ()
) -> str:
    """Return the backend that moe.experts.backend selects on this device.

    `auto` is `torch` on CPU; on CUDA `grouped_mm` in bfloat16 where torch has a kernel for this
    device and these widths, else `torch`. `te` is taken where it is asked for, or where it was
    measured to be faster (`experts_trial.py`); `scaled_mm`, which rounds activations, only where it
    is asked for. Experts held in FP8 are no matter of `auto` here: see `deep_gemm_serves`.

    Args:
        name: moe.experts.backend.
        device, dtype: of the weights.
        widths: the experts' input and hidden dim.

    Raises:
        ValueError: naming the backend and what it needs.
    """
    if name == "auto":
        if device.type != "cuda" or _copies_offsets(device, dtype) or find_grouped_mm() is None:
            return "torch"
        if unaligned := _unaligned(widths, dtype):
            _warn_once(f"{_alignment(unaligned, dtype)}; going on with the backend 'torch'")
            return "torch"
        return "grouped_mm"
    if name == "te":
        if device.type != "cuda":
            raise ValueError(
                f"moe.experts.backend: 'te' runs on CUDA only and the device is {device.type}; "
                "choose 'auto', 'torch' or 'grouped_mm'"
            )
        import_transformer_engine()
    if name == "grouped_mm":
        _check_grouped_mm(device, dtype, widths)
    if name == "scaled_mm":
        _check_scaled_mm(device, dtype, widths)
    if name == "deep_gemm":
        _check_deep_gemm(device, dtype, widths)
    return name


def deep_gemm_serves(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> bool:
    """Return whether `auto` takes `deep_gemm` for plain experts in FP8 in blocks of 128 x 128.

    Warns where the library is installed and cannot be used. The arguments are those of
    `choose_backend`.
    """
    if device.type != "cuda" or not deep_gemm_library.is_installed():
        return False
    try:
        _check_deep_gemm(device, dtype, widths)
    except ValueError as error:
        _warn_once(f"{str(error).split(';')[0]}; going on without DeepGEMM")
        return False
    return True


def _check_deep_gemm(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> None:
    """Refuse `deep_gemm` where the library cannot run.

    Raises:
        ValueError: naming what it needs.
    """
    where, found = "moe.experts.backend: 'deep_gemm'", ""
    if device.type != "cuda":
        found = f"the device is {device.type}"
    elif (capability := torch.cuda.get_device_capability(device))[0] != _DEEP_GEMM_MAJOR:
        found = f"this GPU's is {capability[0]}.{capability[1]}"
    elif not triton_support.serves_on(device):
        found = "Triton is not installed"
    elif dtype != torch.bfloat16:
        found = f"model.dtype is {str(dtype).removeprefix('torch.')}"
    else:
        try:
            deep_gemm_library.load_deep_gemm()
        except ImportError as error:
            found = str(error)
    if found:
        raise ValueError(
            f"{where} needs a GPU of compute capability 9.0 (H100, H200), DeepGEMM, Triton and "
            f"model.dtype bfloat16, and {found}; choose 'auto'"
        )
    if (width := next((n for n in widths if n % _DEEP_GEMM_MULTIPLE), None)) is not None:
        raise ValueError(
            f"{where} needs experts whose input and hidden dim are multiples of "
            f"{_DEEP_GEMM_MULTIPLE}, and one of this checkpoint is {width} (hidden_size and "
            "moe_intermediate_size or intermediate_size in config.json); choose 'auto'"
        )


def _check_scaled_mm(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> None:
    """Refuse `scaled_mm` where torch cannot run it.

    Raises:
        ValueError: naming what it needs.
    """
    where, found = "moe.experts.backend: 'scaled_mm'", ""
    if device.type != "cuda":
        found = f"the device is {device.type}"
    elif not hasattr(torch, "_scaled_grouped_mm"):
        found = f"this is torch {torch.__version__}"
    elif (capability := torch.cuda.get_device_capability(device))[0] != _SCALED_MM_MAJOR:
        found = f"this GPU's is {capability[0]}.{capability[1]}"
    elif not triton_support.serves_on(device):
        found = "Triton is not installed"
    elif dtype != torch.bfloat16:
        found = f"model.dtype is {str(dtype).removeprefix('torch.')}"
    if found:
        raise ValueError(
            f"{where} needs a GPU of compute capability 9.0 (H100, H200), torch >= 2.8, Triton "
            f"and model.dtype bfloat16, and {found}; choose 'auto'"
        )
    if (width := next((n for n in widths if n % _SCALED_MM_MULTIPLE), None)) is not None:
        raise ValueError(
            f"{where} needs experts whose input and hidden dim are multiples of "
            f"{_SCALED_MM_MULTIPLE}, and one of this checkpoint is {width} (hidden_size and "
            "moe_intermediate_size or intermediate_size in config.json); choose 'auto'"
        )


def _check_grouped_mm(device: torch.device, dtype: torch.dtype, widths: Sequence[int]) -> None:
    """Refuse `grouped_mm` where torch cannot run it; warn where it waits for the device.

    Raises:
        ValueError: naming what it needs.
    """
    copies = _copies_offsets(device, dtype)
    if not hasattr(F, "grouped_mm") and (copies or find_grouped_mm() is None):
        raise ValueError(
            "moe.experts.backend: 'grouped_mm' needs torch >= 2.10, or torch >= 2.8 with bfloat16 "
            f"on a GPU of compute capability 9.0 or 10.0; this is torch {torch.__version__} with "
            f"{str(dtype).removeprefix('torch.')} on {device.type}; choose 'auto' or 'torch'"
        )
    if unaligned := _unaligned(widths, dtype):
        raise ValueError(
            f"moe.experts.backend: {_alignment(unaligned, dtype)}; choose 'auto' or 'torch'"
        )
    if copies and device.type == "cuda":
        _warn_once(
            f"moe.experts.backend: 'grouped_mm' in {str(dtype).removeprefix('torch.')} on this GPU "
            "copies its offsets to the host, so every layer waits for the device; 'torch' runs the "
            "same loop without waiting"
        )


def _copies_offsets(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether grouped_mm would take torch's fallback, which reads offsets on the host."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return True
    return torch.cuda.get_device_capability(device)[0] not in _GROUPED_MM_MAJORS


@functools.cache
def _warn_once(text: str) -> None:
    """Log a warning that every layer would repeat."""
    logger.warning("%s", text)


def _unaligned(widths: Sequence[int], dtype: torch.dtype) -> int | None:
    """Return the first width whose rows grouped_mm cannot take."""
    return next((n for n in widths if n * dtype.itemsize % _GROUPED_MM_ALIGNMENT), None)


def _alignment(width: int, dtype: torch.dtype) -> str:
    multiple = _GROUPED_MM_ALIGNMENT // dtype.itemsize
    return (
        f"'grouped_mm' needs experts whose input and hidden dim are multiples of {multiple} in "
        f"{str(dtype).removeprefix('torch.')}, and one of this checkpoint is {width} (hidden_size "
        "and moe_intermediate_size or intermediate_size in config.json)"
    )
