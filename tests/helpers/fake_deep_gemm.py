"""DeepGEMM's grouped FP8 products on CPU tensors, in float32: slow, and refuses what it refuses.

Names, arguments and rules are those of version 2.8.0 (September 2026) on compute capability 9.0.
Results of rows that belong to no expert are NaN here and unspecified there. One rule is stricter:
scales of rows that are not stored column by column cost a launch there, and are refused here.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F

ALIGNMENT = 128  # of an expert's first row, the library's default
_BLOCK = 128  # outputs and columns per scale
_TILE = 64  # rows that a step of the smallest tile writes together
Pair = tuple[torch.Tensor, torch.Tensor]


class ContractError(ValueError):
    """A call that the library refuses, or computes wrongly without a sign of it."""


def _demand(holds: bool, rule: str) -> None:
    if not holds:
        raise ContractError(rule)


def _check_rows(rows: Pair, num: int, inputs: int) -> None:
    codes, scale = rows
    _demand(codes.dtype == torch.float8_e4m3fn, "rows are float8_e4m3fn")
    _demand(codes.is_contiguous(), "rows lie row by row")
    _demand(scale.dtype == torch.float32, "scales of rows are float32")
    _demand(scale.dim() == codes.dim(), "rows and their scales have as many dimensions")
    _demand(tuple(scale.shape[-2:]) == (num, -(-inputs // _BLOCK)), "a scale per row, 128 columns")
    by_column = scale.stride(-2) == 1 and scale.stride(-1) == -(-num // 4) * 4
    _demand(by_column, "scales of rows lie column by column, each column on 16 bytes")
    if scale.dim() == 3:
        _demand(scale.stride(0) == scale.stride(2) * scale.shape[2], "groups of scales are dense")


def _check_weights(weights: Pair, inputs: int) -> None:
    codes, scale = weights
    groups, outputs, _ = codes.shape
    _demand(codes.dtype == torch.float8_e4m3fn, "weights are float8_e4m3fn")
    _demand(codes.shape[2] == inputs, "rows and weights have as many columns")
    _demand(codes.is_contiguous(), "weights lie row by row")
    _demand(scale.dtype == torch.float32, "scales of weights are float32")
    shape = groups, -(-outputs // _BLOCK), -(-inputs // _BLOCK)
    _demand(tuple(scale.shape) == shape, "a scale per block of 128 x 128")
    _demand(scale.is_contiguous(), "scales of weights are contiguous")


def _wide(codes: torch.Tensor, scale: torch.Tensor, height: int) -> torch.Tensor:
    full = scale.repeat_interleave(height, 0).repeat_interleave(_BLOCK, 1)
    return codes.float() * full[: codes.shape[0], : codes.shape[1]]


def m_grouped_fp8_gemm_nt_contiguous(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """Write x W^T of each row's group into d [M, N]; grouped_layout has the group or -1."""
    assert recipe is recipe_a is recipe_b is None and not use_psum_layout, "not emulated"
    num, inputs = a[0].shape
    _check_rows(a, num, inputs)
    _check_weights(b, inputs)
    groups, outputs, _ = b[0].shape
    _demand(d.dtype == torch.bfloat16 and d.shape == (num, outputs), "results are bfloat16 [M, N]")
    _demand(d.is_contiguous(), "results lie row by row")
    _demand(grouped_layout.dtype == torch.int32, "groups of rows are int32")
    _demand(grouped_layout.shape == (num,) and grouped_layout.is_contiguous(), "a group per row")
    _demand(int(grouped_layout.max()) < groups, "no such group")
    d.fill_(torch.nan)
    for first in range(0, num, ALIGNMENT):
        group_of = grouped_layout[first : first + ALIGNMENT]
        group = int(group_of[0])  # the tile's weights are those of its first row
        is_mine = group_of == group if group >= 0 else torch.zeros_like(group_of, dtype=torch.bool)
        _demand(bool((is_mine | (group_of < 0)).all()), "a group begins at a multiple of 128 rows")
        count = int(is_mine.sum())
        _demand(bool(is_mine[:count].all()), "rows of no group are behind those of a group")
        if count:
            own = slice(first, first + count)
            weights = _wide(b[0][group], b[1][group], _BLOCK)
            d[own] = F.linear(_wide(a[0][own], a[1][own], 1), weights).to(d.dtype)


def m_grouped_fp8_gemm_nt_masked(
    a: Pair,
    b: Pair,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """Write x W^T of the first masked_m[g] rows of each group into d [G, M, N]."""
    assert recipe is recipe_a is recipe_b is None, "not emulated"
    groups, num, inputs = a[0].shape
    _check_rows(a, num, inputs)
    _check_weights(b, inputs)
    outputs = b[0].shape[1]
    _demand(b[0].shape[0] == groups == len(masked_m), "as many groups everywhere")
    _demand(d.dtype == torch.bfloat16 and d.shape == (groups, num, outputs), "bfloat16 [G, M, N]")
    _demand(d.is_contiguous(), "results lie row by row")
    _demand(masked_m.dtype == torch.int32 and masked_m.is_contiguous(), "counts are int32")
    _demand(int(masked_m.max()) <= num and num % (2 * _TILE) == 0, "rows of whole tiles per group")
    _demand(expected_m > 0, "some rows are expected")
    d.fill_(torch.nan)
    for group, count in enumerate(masked_m.tolist()):
        if count:
            weights = _wide(b[0][group], b[1][group], _BLOCK)
            rows = _wide(a[0][group, :count], a[1][group, :count], 1)
            d[group, :count] = F.linear(rows, weights).to(d.dtype)


def get_mk_alignment_for_contiguous_layout() -> int:
    """Return the alignment of groups."""
    return ALIGNMENT


def fake_module() -> ModuleType:
    """Return what `import deep_gemm` is to find in sys.modules."""
    module = ModuleType("deep_gemm")
    module.__version__ = "2.8.0"  # pyright: ignore[reportAttributeAccessIssue]
    for each in (
        m_grouped_fp8_gemm_nt_contiguous,
        m_grouped_fp8_gemm_nt_masked,
        get_mk_alignment_for_contiguous_layout,
    ):
        setattr(module, each.__name__, each)
    return module
