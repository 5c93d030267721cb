"""MoE step: which tokens a step has and which of them are subject to capacity.

All layers of a step share one `MoEStep`, but for layers with phases of their own (`by_layer`).
Everything in it that shapes a collective (`num_tokens_W`, `num_eligible`) is the same on every rank
of the expert-parallel group.

Legend: T tokens on this rank, W expert-parallel ranks, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class TokenCounts:
    """What capacity did to each of this rank's tokens, summed over the layers of one step."""

    dropped_T: torch.Tensor  # float32, assignments
    added_T: torch.Tensor  # float32, assignments
    mass_T: torch.Tensor  # float32, combine weights of the original top-k
    mass_kept_T: torch.Tensor  # float32, combine weights of the assignments kept
    copied_T: torch.Tensor  # float32, assignments that low-bit copies computed

    @classmethod
    def zeros(cls, num_tokens: int, device: torch.device) -> TokenCounts:
        """Return counts of zero."""
        return cls(*torch.zeros(5, num_tokens, device=device).unbind(0))

    def stack(self) -> torch.Tensor:
        """Return float32 [T, 5]: dropped, added, mass, mass kept, copied."""
        parts = (self.dropped_T, self.added_T, self.mass_T, self.mass_kept_T, self.copied_T)
        return torch.stack(parts, dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEStep:
    """The tokens of one step as capacity sees them."""

    # (request, position) is a token's global id, which breaks ties and does not depend on the rank.
    request_T: torch.Tensor  # int32
    position_T: torch.Tensor  # int32
    eligible_T: torch.Tensor | None  # bool, tokens subject to capacity; None: all
    num_own_eligible: int  # this rank's tokens subject to capacity
    num_tokens_W: tuple[int, ...]  # all tokens, per rank of the group
    num_eligible: int  # T_g, the group's tokens subject to capacity
    counts: TokenCounts | None = None  # the layers add to it; None: not counted
    weights_W: tuple[int, ...] | None = None  # weight per rank (`speed_weights.py`); None: equal
    # Whether a capacity policy limits the eligible tokens; else low-bit copies may take their rows.
    limited: bool = True
    # Where not limited, the same for the last layer, which runs only the rows that are read; None:
    # its rows stay at their homes.
    last: MoEStep | None = None
    # Whether the last layer runs all rows, because they compete there; else those that are read.
    limits_last: bool = True
    # Where the phases that compete differ between layers (moe.policy): the step as a layer sees it,
    # None where no token competes there; other layers see this one.
    by_layer: Mapping[int, MoEStep | None] | None = None

    @property
    def runs_last_whole(self) -> bool:
        """Whether the last layer runs all rows."""
        return self.limited and self.limits_last

    def of(self, layer: int) -> MoEStep | None:
        """Return the step as a layer sees it."""
        return self if self.by_layer is None else self.by_layer.get(layer, self)

    @classmethod
    def whole(
        cls, request_T: torch.Tensor, position_T: torch.Tensor, num_tokens_W: tuple[int, ...]
    ) -> MoEStep:
        """Return a step in which every token is subject to capacity.

        request_T, position_T: integers [T].
        """
        return cls(
            request_T=request_T.to(torch.int32),
            position_T=position_T.to(torch.int32),
            eligible_T=None,
            num_own_eligible=request_T.shape[0],
            num_tokens_W=tuple(num_tokens_W),
            num_eligible=sum(num_tokens_W),
        )
