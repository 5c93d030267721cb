"""x @ W^T + b for the dense projections of a layer.

The compiled CPU kernel takes any number of rows; its result for a row does not depend on the
others, bit for bit, which BLAS does not promise.

Legend: T tokens, D input dim, O output dim.
"""

import torch
import torch.nn.functional as F

from engine.ops import native
from engine.ops.panels import in_panels


def linear(
    x_TD: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns x_TD @ weight_OD^T (+ bias_O): [T, O] in x's dtype; leading dims of x are kept.

    weight_OD may be in panels (`panels.py`), and bfloat16 where x is
    float32 (`native.py` says what is rounded).
    """
    panels = in_panels(weight_OD)
    if native.serves(x_TD) and native.serves_weights(weight_OD) and weight_OD.stride(1) == 1:
        return torch.ops.lockstep_cpu.linear(x_TD, weight_OD, bias_O, panels)
    assert not panels, "weights in panels are for the compiled kernels alone"
    return linear_reference(x_TD, weight_OD, bias_O)


def linear_reference(
    x_TD: torch.Tensor, weight_OD: torch.Tensor, bias_O: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain torch form of `linear`."""
    if weight_OD.dtype != x_TD.dtype:
        weight_OD = weight_OD.to(x_TD.dtype)
    return F.linear(x_TD, weight_OD, bias_O)
