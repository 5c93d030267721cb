"""The compiled CPU kernels: loads `engine/_native*.so` and says in words whether it runs.

Every op in this folder has a plain torch reference. On CPU in float32 it goes to the torch
library `lockstep_cpu` instead (sources in csrc/, compiled at install time by build.py) whenever
that library is present. The environment variable LOCKSTEP_NATIVE chooses: 0 switches it off;
avx512, avx2 or generic forces one instruction set; 1 (the default) takes the processor's best.

    python -c "from engine.ops import native; print(native.reason())"
"""

import functools
import os
from pathlib import Path

import torch

import engine
from engine.ops.build import source_digest

ISAS = ("avx512", "avx2", "generic")


def available() -> bool:
    """Whether the compiled kernels run in this process."""
    return _load()[0]


def reason() -> str:
    """One sentence: which compiled kernels run here, or why torch serves instead."""
    return _load()[1]


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the compiled kernels take these tensors: float32, on CPU, no gradient asked for."""
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
        if tensor.requires_grad and torch.is_grad_enabled():
            return False
    return available()


def serves_weights(*weights: torch.Tensor) -> bool:
    """Whether the compiled `linear` and `grouped_ffn` take these weights for float32 rows: all of one
    dtype, on CPU, no gradient asked for.
    """
    return serves(*weights)


def has_bfloat16_products() -> bool:
    """Whether products with bfloat16 weights run on the processor's own bfloat16 dot products."""
    return False


@functools.cache
def _load() -> tuple[bool, str]:
    wanted = os.environ.get("LOCKSTEP_NATIVE", "1")
    if wanted not in ("0", "1", *ISAS):
        raise ValueError(
            f"LOCKSTEP_NATIVE={wanted!r}: must be 0 (torch only), 1 (the best this processor has), "
            f"or one of {', '.join(ISAS)}; unset it to take the default"
        )
    if wanted == "0":
        return False, "native CPU kernels are switched off (LOCKSTEP_NATIVE=0); torch serves"
    again = "Run `pip install -e . --no-build-isolation` again"
    files = sorted(Path(engine.__file__).parent.glob("_native*.so"))
    if not files:
        return False, (
            "native CPU kernels were not built (no engine/_native*.so); torch serves. "
            f"{again}, with a C++20 compiler"
        )
    try:
        torch.ops.load_library(str(files[0]))
        built_for, sources = torch.ops.lockstep_cpu.built_from().split()
        isa = torch.ops.lockstep_cpu.select("" if wanted == "1" else wanted)
    except (OSError, RuntimeError, AttributeError) as error:
        return False, f"native CPU kernels do not load ({error}); torch serves. {again}"
    running = torch.__version__.split("+")[0]
    if built_for != running:
        return False, (
            f"native CPU kernels were built for torch {built_for} and torch {running} runs; "
            f"torch serves. {again}"
        )
    if sources != source_digest():
        return False, f"native CPU kernels were built from other sources; torch serves. {again}"
    return True, f"native CPU kernels run ({isa})"
