"""Weights in panels: the layout that the compiled CPU kernels read fastest, made once, in place.

Sixteen rows of a matrix lie transposed together, so that memory is read as one stream and a lane of
a vector is a row of weights. A product of one to eight rows of x then runs at the speed of memory,
and one of 20 costs 20 rows and not two whole vectors of them. Results are the same bits.

    w [32, K]:  w[0:16]^T, w[16:32]^T        w [20, K]:  w[0:16]^T, then rows 16 to 19 as they were

In bfloat16 pairs of columns stay together, so that a row's pair is one word of 32 bits, and the
last column of an odd K lies behind the pairs:

    w [16, 5]:  w[0, 0:2], w[1, 0:2], ..., w[15, 0:2], w[0, 2:4], ..., w[15, 2:4], w[0:16, 4]
"""

import torch

from engine.ops import native

_MARK = "lockstep_in_panels"
_PANEL = 16  # rows of a panel, as in csrc/kernels.h


def to_panels(weight: torch.Tensor, stacked: int = 1) -> bool:
    """Bring float32 or bfloat16 CPU weights [..., N, K] into panels where the compiled kernels run;
    True if so.

    stacked: how many matrices of as many rows lie one after the other in N, each in panels of its
    own. In place, without a second copy. Afterwards only `linear` and `grouped_ffn`, given this
    very tensor object, know how to read it: a view or a copy of it is garbage. Calling it again
    changes nothing.
    """
    if in_panels(weight):
        return True
    if not (native.serves_weights(weight) and weight.is_contiguous()):
        return False
    rows, depth = weight.shape[-2:]
    torch.ops.lockstep_cpu.to_panels(weight.view(-1, rows // stacked, depth))
    setattr(weight, _MARK, True)
    return True


def in_panels(weight: torch.Tensor) -> bool:
    """Whether `to_panels` has rearranged this tensor."""
    return getattr(weight, _MARK, False)


def matrices(weights: torch.Tensor) -> list[torch.Tensor]:
    """Return the matrices [N, K] of weights [e, N, K] as views that `linear` reads, each one panel
    layout of its own (`stacked` 1) where the weights are in panels.
    """
    found = list(weights.detach().unbind())
    if in_panels(weights):
        for each in found:
            setattr(each, _MARK, True)
    return found


def from_panels(weight: torch.Tensor, index: int, stacked: int = 1) -> torch.Tensor:
    """Return a copy of one matrix [N, K] of weights [e, N, K] in its plain layout, whether the
    weights are in panels or not.

    stacked: as for `to_panels`.
    """
    plain = weight.detach()[index].clone()
    if not in_panels(weight):
        return plain
    rows, depth = plain.shape[0] // stacked, plain.shape[1]
    whole = rows // _PANEL * _PANEL
    for part in plain.view(stacked, rows, depth):
        panels = part[:whole].reshape(whole // _PANEL, depth * _PANEL).clone()
        group = 2 if part.dtype is torch.bfloat16 else 1  # columns that lie together
        grouped = depth // group * group
        shape = (whole // _PANEL, grouped // group, _PANEL, group)
        first = panels[:, : grouped * _PANEL].reshape(shape).transpose(1, 2)
        part[:whole, :grouped] = first.reshape(whole, grouped)
        if grouped < depth:
            part[:whole, grouped] = panels[:, grouped * _PANEL :].reshape(whole)
    return plain
