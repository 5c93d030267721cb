"""DeepGEMM, where it is installed: its grouped FP8 products, imported when they are asked for.

Read in version 2.8.0 (September 2026), not run on a GPU yet. Positional arguments of both products
are the same since 2.0 (July 2025); their names are not, so they are looked up before use.
Importing it needs a CUDA toolkit, and each shape is compiled at its first call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

_CONTIGUOUS = "m_grouped_fp8_gemm_nt_contiguous"
_MASKED = "m_grouped_fp8_gemm_nt_masked"
_ALIGNMENT = "get_mk_alignment_for_contiguous_layout"


class DeepGemm(NamedTuple):
    """What is used of the library.

    Rows and weights are pairs of float8_e4m3fn codes and float32 scales: of rows per 128 columns,
    stored column by column; of weights [e, O, I] per block of 128 x 128.
    """

    contiguous: Callable[..., Any]  # (rows [P, I], weights, out [P, O], experts of rows: int32 [P],
    # -1: none)
    masked: Callable[..., Any]  # (rows [e, M, I], weights, out [e, M, O], rows of each expert:
    # int32 [e], rows to expect per expert)
    alignment: Callable[[], int]  # rows of an expert begin at a multiple of it, of `contiguous`


def is_installed() -> bool:
    """Return whether there is such a library to import."""
    try:
        return importlib.util.find_spec("deep_gemm") is not None
    except ValueError:  # imported from no file
        return True


def load_deep_gemm() -> DeepGemm:
    """Import the library.

    Raises:
        ImportError: it is not installed, its import fails, or it lacks a product; the text is a
            clause about it.
    """
    if not is_installed():
        raise ImportError("DeepGEMM (deep_gemm) is not installed")
    try:
        import deep_gemm  # pyright: ignore[reportMissingImports]
    except Exception as error:  # no CUDA toolkit, a build for another torch: it fails in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ImportError(f"the import of deep_gemm fails ({reason})") from error
    for name in (_CONTIGUOUS, _MASKED, _ALIGNMENT):
        if not hasattr(deep_gemm, name):
            version = getattr(deep_gemm, "__version__", "unknown")
            raise ImportError(f"deep_gemm {version} has no {name}, which 2.8.0 has")
    return DeepGemm(*(getattr(deep_gemm, name) for name in (_CONTIGUOUS, _MASKED, _ALIGNMENT)))
