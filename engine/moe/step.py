"""What an MoE layer knows of a step beyond its tokens: who they are and which compete for capacity.

The runner makes one `MoEStep` a step from the scheduler's slices and the agreed control words; all
layers of the step share it. Everything in it that shapes a collective (`num_tokens_W`,
`num_competing`) is the same on every rank of the expert-parallel group.

Legend: T tokens on this rank, W expert-parallel ranks, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class TokenCounts:
    """What capacity did to each of this rank's tokens, added up over the layers of one step.

    dropped_T, added_T: float32 [T], assignments. mass_T, mass_kept_T: float32 [T], combine weights
    of the original top-k, and of those that survived.
    """

    dropped_T: torch.Tensor
    added_T: torch.Tensor
    mass_T: torch.Tensor
    mass_kept_T: torch.Tensor

    @classmethod
    def zeros(cls, num_tokens: int, device: torch.device) -> TokenCounts:
        """Nothing has happened yet."""
        return cls(*(torch.zeros(num_tokens, device=device) for _ in range(4)))

    def stack(self) -> torch.Tensor:
        """float32 [T, 4]: dropped, added, mass, mass kept."""
        return torch.stack((self.dropped_T, self.added_T, self.mass_T, self.mass_kept_T), dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEStep:
    """One step as capacity sees it.

    request_T, position_T: int32 [T]; (request, position) is a token's global id, which breaks ties
    and does not depend on the rank that holds it. competes_T: bool [T], tokens of the phases under
    capacity; None where all compete. num_own_competing: how many that are on this rank.
    num_tokens_W: tokens of every rank of the group, competing or not. num_competing: T_g, competing
    tokens of the group. tally: filled by the layers; None when nobody asks. shares_W:
    each rank's share of the capacity (`shares.py`); None: all the same.
    """

    request_T: torch.Tensor
    position_T: torch.Tensor
    competes_T: torch.Tensor | None
    num_own_competing: int
    num_tokens_W: tuple[int, ...]
    num_competing: int
    tally: TokenCounts | None = None
    shares_W: tuple[int, ...] | None = None

    @classmethod
    def whole(
        cls, request_T: torch.Tensor, position_T: torch.Tensor, num_tokens_W: tuple[int, ...]
    ) -> MoEStep:
        """A step in which every token competes. request_T, position_T: integers [T]."""
        return cls(
            request_T=request_T.to(torch.int32),
            position_T=position_T.to(torch.int32),
            competes_T=None,
            num_own_competing=request_T.shape[0],
            num_tokens_W=tuple(num_tokens_W),
            num_competing=sum(num_tokens_W),
        )
