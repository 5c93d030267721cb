"""The compiled CPU kernels: loads `engine/_native*.so` and says in words whether it runs.

Every op in this folder has a plain torch reference. On CPU in float32 it goes to the torch
library `lockstep_cpu` instead (sources in csrc/, compiled at install time by build.py) whenever
that library is present. The environment variable LOCKSTEP_NATIVE chooses: 0 switches it off;
avx512_bf16, avx512, avx2 or generic forces one instruction set; 1 (the default) takes the
processor's best.

`linear` and `grouped_ffn` take bfloat16 weights too, for float32 rows, with float32 results. With
avx512_bf16 they use the processor's dot products of bfloat16 pairs: every row of x, and the hidden
rows between the two products of an expert, are rounded to bfloat16 (8 bits of significand, to the
nearest even; magnitudes below 2^-126 become 0), as on a GPU that computes in bfloat16. Products are
exact, sums and results float32. The other sets widen the weights and round nothing: the same bits
as with `weight.float()`.

    python -c "from engine.ops import native; print(native.reason())"
"""

import functools
import os
from pathlib import Path

import torch

import engine
from engine.ops.build import source_digest

ISAS = ("avx512_bf16", "avx512", "avx2", "generic")


def available() -> bool:
    """Whether the compiled kernels run in this process."""
    return _load()[0]


def reason() -> str:
    """One sentence: which compiled kernels run here, or why torch serves instead."""
    return _load()[1]


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the compiled kernels take these tensors: float32, on CPU, no gradient asked for."""
    return _serve(tensors, torch.float32)


def serves_weights(*weights: torch.Tensor) -> bool:
    """Whether the compiled `linear` and `grouped_ffn` take these weights for float32 rows:
    float32 or bfloat16, all the same, on CPU, no gradient asked for.
    """
    return _serve(weights, torch.bfloat16 if weights[0].dtype is torch.bfloat16 else torch.float32)


def has_bfloat16_products() -> bool:
    """Whether products with bfloat16 weights run on the processor's dot products, which round the
    rows of x to bfloat16; otherwise the weights are widened.
    """
    return available() and torch.ops.lockstep_cpu.has_bfloat16_products()


def _serve(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> bool:
    for tensor in tensors:
        if tensor.dtype is not dtype or not tensor.is_cpu:
            return False
        if tensor.requires_grad and torch.is_grad_enabled():
            return False
    return available()


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
