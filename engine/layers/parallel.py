"""Tensor parallelism of attention: which heads a rank owns, its output projection and its sums.

Only attention (`attention.py`, `mla.py`) is split: query heads are cut into equal consecutive
shares, the output projection is cut along the same heads, and its partial products are summed over
`topology.tensor`. Embeddings, norms, dense MLPs and the language-model head are replicated.

Worked example, 8 query heads, 2 key/value heads:
    tensor 2    rank 0: heads 0-3, kv head 0      rank 1: heads 4-7, kv head 1
    tensor 4    rank 0: heads 0-1, kv head 0      rank 1: heads 2-3, kv head 0 (a replica)   ...

Legend: T tokens, D model dim, O columns of the output projection on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from engine.distributed.groups import Group
from engine.ops.linear import linear
from engine.profiling.phase_clock import NO_LAYER, Phase
from engine.profiling.telemetry import Telemetry
from engine.weights.slot import WeightSlot


@dataclass(frozen=True, slots=True)
class HeadShare:
    """The heads that one tensor rank owns, consecutive from the first one."""

    num_heads: int
    first_head: int
    num_kv_heads: int
    first_kv_head: int
    kv_replicas: int  # ranks of the tensor group with the same key/value heads


def share_heads(num_heads: int, num_kv_heads: int, group: Group) -> HeadShare:
    """Return this rank's consecutive share of the heads.

    Key/value heads are replicated when there are fewer of them than ranks.

    Raises:
        ValueError: when the ranks do not divide the heads evenly.
    """
    size = group.size
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_key_value_heads = {num_kv_heads} must divide num_attention_heads = {num_heads}; "
            f"check the checkpoint's config.json"
        )
    if num_heads % size:
        raise ValueError(
            f"parallel.tensor = {size} must divide the model's {num_heads} attention heads; "
            f"set parallel.tensor to a divisor of {num_heads}"
        )
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(
            f"parallel.tensor = {size} must divide the model's {num_kv_heads} key/value heads or "
            f"be a multiple of them; set parallel.tensor to a divisor of {num_kv_heads}"
        )
    replicas = max(1, size // num_kv_heads)
    local_kv = max(1, num_kv_heads // size)
    return HeadShare(
        num_heads=num_heads // size,
        first_head=group.rank * (num_heads // size),
        num_kv_heads=local_kv,
        first_kv_head=group.rank // replicas * local_kv,
        kv_replicas=replicas,
    )


class TensorSum:
    """Sums partial results of one layer's attention over the tensor group, each in its own span."""

    def __init__(self, group: Group, calls: int = 1) -> None:
        """calls: sums per attention call."""
        self.group = group
        self._calls = calls if group.size > 1 else 0
        self.set_telemetry(Telemetry(), NO_LAYER)

    @property
    def num_collectives(self) -> int:
        """Collectives per attention call."""
        return self._calls

    def set_telemetry(self, telemetry: Telemetry, layer: int) -> None:
        """Set where the sums are recorded, and the decoder layer they belong to."""
        self._telemetry, self._layer = telemetry, layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the group in place and return it.

        Collective over TP: every rank must call. A group of one rank calls nothing.
        """
        size = self.group.size
        if size == 1:
            return x
        clock = self._telemetry.clock
        clock.enter_collective(Phase.TENSOR, self._layer, x.shape[0])
        clock.sent(round(x.numel() * x.element_size() * 2 * (size - 1) / size))
        dist.all_reduce(x, group=self.group.handle)
        clock.enter(Phase.ATTENTION, self._layer)
        return x

    def record_skipped(self, calls: int | None = None) -> None:
        """Record collectives that this tensor group skips because it has no tokens.

        Other tensor groups may call them: so all ranks number the collectives of a step alike.

        Args:
            calls: how many are skipped; None: all of an attention call.
        """
        for _ in range(self._calls if calls is None else calls):
            self._telemetry.clock.skip_collective(Phase.TENSOR, self._layer)


def empty_parameter(*shape: int, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    """Return an uninitialised parameter without gradient, to be filled by a `WeightSlot`."""
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)


def project_out(
    x_TO: torch.Tensor, out_DO: torch.Tensor, bias_D: torch.Tensor | None, sums: TensorSum
) -> torch.Tensor:
    """Return the output projection [T, D] of the heads' outputs, summed over the tensor group.

    Args:
        x_TO: outputs of this rank's heads.
        out_DO: the projection's columns of these heads.
        bias_D: the same on every rank, added once.

    Collective over TP: every rank must call.
    """
    if sums.group.size == 1:
        return linear(x_TO, out_DO, bias_D)
    if not x_TO.shape[0]:  # no token of this step is read: the same on all ranks of the group
        sums.record_skipped(1)
        return x_TO.new_empty(0, out_DO.shape[0])
    out_TD = sums(linear(x_TO, out_DO))
    # After the sum, so that the bias counts once.
    return out_TD if bias_D is None else out_TD + bias_D


def out_slots(
    prefix: str, out_DO: torch.Tensor, bias_D: torch.Tensor | None, columns: slice, full: int
) -> Iterator[WeightSlot]:
    """Yield the slots of an output projection that owns `columns` of the `full` input width."""
    hidden = out_DO.shape[0]
    yield WeightSlot(f"{prefix}.o_proj.weight", out_DO, (hidden, full), (slice(None), columns))
    if bias_D is not None:
        yield WeightSlot(f"{prefix}.o_proj.bias", bias_D, (hidden,), kind="bias")
