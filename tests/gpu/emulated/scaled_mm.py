"""torch._scaled_grouped_mm of the emulated device: slow, and refuses what CUDA refuses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_MULTIPLE = 16  # of all dims, and bytes of every address


def scaled_grouped_mm(
    rows_RK: torch.Tensor,
    weights_eKN: torch.Tensor,
    scale_R: torch.Tensor,
    scale_eN: torch.Tensor,
    offs: torch.Tensor,
    bias: None = None,
    scale_result: None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> torch.Tensor:
    """Return the product [R, N] in out_dtype, each group by itself in float32.

    torch's own rule for tensors without memory checks dtypes, strides, scales and offsets.

    Raises:
        ValueError: what that rule leaves to the device.
    """
    shapes = [
        torch.empty_strided(each.size(), each.stride(), dtype=each.dtype, device="meta")
        for each in (rows_RK, weights_eKN, scale_R, scale_eN)
    ]
    torch.ops.aten._scaled_grouped_mm(
        *shapes,
        offs=torch.empty_like(offs, device="meta"),
        bias=bias,
        scale_result=scale_result,
        out_dtype=out_dtype,
        use_fast_accum=use_fast_accum,
    )
    dims = (rows_RK.shape[1], *weights_eKN.shape[1:])
    addresses = (rows_RK.data_ptr(), weights_eKN.data_ptr())
    if any(each % _MULTIPLE for each in (*dims, *addresses)):
        raise ValueError(f"dims {dims}: they, and addresses, must be multiples of {_MULTIPLE}")
    assert offs.is_contiguous() and len(offs) == len(weights_eKN)
    out_RN = torch.empty(len(rows_RK), weights_eKN.shape[2], dtype=out_dtype)
    start = 0
    for group, end in enumerate(offs.tolist()):
        if start < end:
            part = slice(start, end)
            made_RN = F.linear(rows_RK[part].float(), weights_eKN[group].float().T)
            out_RN[part] = made_RN * scale_R[part].unsqueeze(1) * scale_eN[group]
        start = end
    assert start == len(rows_RK), "offsets end at the last row"
    return out_RN
