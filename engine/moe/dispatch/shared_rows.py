"""Shared rows: rows of the shared expert that other ranks compute, `moe.shared_expert: balanced`.

Every rank holds the shared expert, so a token's shared row can run wherever the token's row is: at
home, or on a rank of one of its experts, where deduplicated rows are once and are summed
(`moe.dispatch.partial_sums`). There the shared expert is one more bit and one more weight of the
row, behind those of the rank's experts: nothing more is sent.

    candidates  before the counts are exchanged, each rank names one group (`dedup.py`) of another
                rank for each of its tokens: one that has few of its own assignments, in turn
    plan        from the exchanged counts all ranks compute alike how many candidates of every two
                ranks move, so that the most loaded rank has less to do; others stay
    moves       of the candidates for a group the first ones by token move

Which ones move says `shared_plan.py`.

Legend: T tokens on a rank, M columns of the ids, W ranks, C chunks, G groups (C * W), B bytes of a
bitmap, e experts of a group and the shared expert, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from engine.config import MoEConfig
from engine.layers.mlp import DenseMLP
from engine.moe.dispatch.shared_plan import plan_moves
from engine.ops import sort_by_expert as sort_op
from engine.ops.to_device import to_device


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates of one rank's tokens; device tensors only."""

    group_T: torch.Tensor  # int64, -1 where the token has none
    slot_T: torch.Tensor  # int64, its place among the candidates by group, then token; -1
    count_G: torch.Tensor  # int64


@dataclass(frozen=True, slots=True)
class SharedMoves:
    """The shared rows of one rank that move."""

    group_T: torch.Tensor  # int64, the group that a token's shared row moves to; -1: it stays
    num_moved: int
    num_moved_all: int  # of all ranks, the same on every rank
    offset_G: torch.Tensor  # int64, the shared expert's place among the experts of each group

    def bits(self, bits_TGB: torch.Tensor) -> torch.Tensor:
        """Return the bitmaps, uint8 [T, G, B], with the shared expert where it moves."""
        moves_T1, group_T1 = self._columns()
        offset_T1, num_bytes = self.offset_G[group_T1], bits_TGB.shape[2]
        byte_T1 = group_T1 * num_bytes + offset_T1 // 8
        bit_T1 = (moves_T1.long() << offset_T1 % 8).to(torch.uint8)
        flat = bits_TGB.flatten(1)
        return flat.scatter(1, byte_T1, flat.gather(1, byte_T1) | bit_T1).view_as(bits_TGB)

    def weights(self, weights_TGe: torch.Tensor) -> torch.Tensor:
        """Return the weights, float32 [T, G, e], with 1 for the shared expert where it moves."""
        moves_T1, group_T1 = self._columns()
        place_T1 = group_T1 * weights_TGe.shape[2] + self.offset_G[group_T1]
        flat = weights_TGe.flatten(1)
        return flat.scatter(1, place_T1, moves_T1.to(flat.dtype)).view_as(weights_TGe)

    def staying(self) -> torch.Tensor:
        """Return the tokens whose shared rows stay, int64, without a host sync."""
        ids_T1 = -(self.group_T >= 0).long()[:, None]
        return sort_op.sort_by_expert(ids_T1, 1)[0][: len(ids_T1) - self.num_moved]

    def _columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        group_T1 = self.group_T[:, None]
        return group_T1 >= 0, group_T1.clamp(min=0)


class SharedRows:
    """Names candidates and plans moves; built with the same cost on every rank.

    Args:
        rank: this rank's position in the group.
        cost: of a shared row, in rows of routed experts.
    """

    def __init__(self, rank: int, cost: Fraction) -> None:
        self._rank, self._cost = rank, cost

    def candidates(self, group_TM: torch.Tensor, num_groups: int, num_ranks: int) -> Candidates:
        """Return the candidates of this rank's tokens.

        group_TM: int64, the group of each assignment, G where there is none.
        """
        own_W = group_TM.new_full((1,), self._rank)
        group_T = choose_candidates(group_TM[None], own_W, num_groups, num_ranks)[0]
        _, slot_T1, count_G = sort_op.sort_by_expert(group_T[:, None], num_groups)
        return Candidates(group_T, slot_T1[:, 0], count_G)

    def count(self, group_WTM: torch.Tensor, num_groups: int) -> torch.Tensor:
        """Return every rank's candidates by group, int64 [W, G], as `candidates` counts them."""
        num_ranks = len(group_WTM)
        own_W = torch.arange(num_ranks, device=group_WTM.device)
        group_WT = choose_candidates(group_WTM, own_W, num_groups, num_ranks)
        return _count(group_WT.where(group_WT >= 0, num_groups), num_groups)

    def plan(self, rows_WG: np.ndarray, candidates_WG: np.ndarray, tokens_W: np.ndarray):
        """Return the shared rows of every rank that move to every group, int64 [W, G]; pure.

        Args:
            rows_WG: int64, rows of routed experts.
            candidates_WG: int64.
            tokens_W: int64.
        """
        num_ranks = len(tokens_W)
        candidates_WCW = candidates_WG.reshape(num_ranks, -1, num_ranks)
        rows_W = rows_WG.sum(0).reshape(-1, num_ranks).sum(0)
        moved_WW = plan_moves(rows_W, tokens_W, candidates_WCW.sum(1), self._cost)
        # The first chunks' candidates move first.
        before_WCW = candidates_WCW.cumsum(1) - candidates_WCW
        moved_WCW = (moved_WW[:, None] - before_WCW).clip(0, candidates_WCW)
        return moved_WCW.reshape(num_ranks, -1)

    def moves(
        self,
        candidates: Candidates,
        candidates_WG: np.ndarray,
        moved_WG: np.ndarray,
        offset_G: torch.Tensor,
    ) -> SharedMoves:
        """Return which of this rank's shared rows move.

        Args:
            candidates: of this rank.
            candidates_WG: int64, how many every rank has.
            moved_WG: int64, how many of them move.
            offset_G: int64, the shared expert's place in each group.
        """
        group_T, candidates_G = candidates.group_T, candidates_WG[self._rank]
        moved_G = moved_WG[self._rank]
        ends = np.append(candidates_G.cumsum() - candidates_G + moved_G, 0)  # -1 reads the last
        end_G = to_device(torch.from_numpy(ends), group_T.device)
        group_T = group_T.where(candidates.slot_T < end_G[group_T], -1)
        return SharedMoves(group_T, int(moved_G.sum()), int(moved_WG.sum()), offset_G)


class SharedWork:
    """The shared expert of one call, on this rank's own tokens.

    Args:
        module: the shared expert.
        x_TD: this rank's tokens.
    """

    def __init__(self, module: nn.Module, x_TD: torch.Tensor) -> None:
        self._module, self._x_TD = module, x_TD
        self._token_S: torch.Tensor | None = None  # of the output's rows; None: all tokens
        self._out_SD: torch.Tensor | None = None

    def run(self, moves: SharedMoves | None = None) -> None:
        """Compute the rows that stay."""
        x_SD = self._x_TD
        if moves is not None and moves.num_moved:
            self._token_S = moves.staying()
            x_SD = x_SD.index_select(0, self._token_S)
        self._out_SD = self._module(x_SD)

    def add_to(self, out_TD: torch.Tensor) -> torch.Tensor:
        """Return the routed experts' output with that of `run` added."""
        assert self._out_SD is not None, "run comes first"
        if self._token_S is None:
            return out_TD + self._out_SD
        return out_TD.index_add(0, self._token_S, self._out_SD)


def shared_rows(
    config: MoEConfig, shared: nn.Module | None, ffn: int, rank: int
) -> SharedRows | None:
    """Return what lets shared rows move under moe.shared_expert; None: they stay.

    Args:
        shared: the shared expert.
        ffn: hidden dim of the routed experts.
        rank: this rank's position in the group.

    Raises:
        ValueError: there is no shared expert to balance.
    """
    if config.shared_expert == "replicated":
        return None
    if not isinstance(shared, DenseMLP):
        raise ValueError(
            "moe.shared_expert = balanced: the model has no shared expert; use replicated"
        )
    return SharedRows(rank, Fraction(shared.ffn, ffn))


def choose_candidates(
    group_WTM: torch.Tensor, own_W: torch.Tensor, num_groups: int, num_ranks: int
) -> torch.Tensor:
    """Return the group that each token's shared row may move to, int64 [W, T], -1 for none.

    Of the groups of other ranks that the token has rows in, those of ranks with at most the mean of
    its rank's assignments for others come first, then by place, beginning with place t for token t:
    so candidates spread. The order of the columns does not matter.

    Args:
        group_WTM: int64, the group of each assignment, G where there is none.
        own_W: int64, the rank whose tokens each entry holds.
        num_groups: G, chunk by chunk and in a chunk rank by rank.
        num_ranks: ranks of a chunk's groups.
    """
    device, num_tokens = group_WTM.device, group_WTM.shape[1]
    own_W1 = own_W[:, None]
    rows_WR = _count(group_WTM.flatten(1), num_groups).view(len(own_W), -1, num_ranks).sum(1)
    rows_WR = rows_WR.scatter(1, own_W1, 0)
    heavy_WR = (rows_WR * (num_ranks - 1) > rows_WR.sum(1, keepdim=True)).long()
    # 0: light, 1: heavy, 2: none.
    class_WR = heavy_WR.scatter(1, own_W1, 2)
    class_WG = class_WR.repeat(1, num_groups // num_ranks + 1)
    class_WG[:, num_groups:] = 2
    token_T1 = torch.arange(num_tokens, device=device)[:, None]
    class_WTM = class_WG.gather(1, group_WTM.flatten(1)).view_as(group_WTM)
    # (g - t) modulo G, without a division per assignment.
    turn_WTM = group_WTM - token_T1 % num_groups
    turn_WTM += num_groups * (turn_WTM < 0)
    # min, which is far faster than amin along a short last dimension on the CPU.
    key_WT = (class_WTM * num_groups + turn_WTM).min(2).values
    return ((key_WT + token_T1[:, 0]) % num_groups).where(key_WT < 2 * num_groups, -1)


def _count(group_WN: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return how often each rank has each group, int64 [W, G]; G is not counted."""
    count_WG = group_WN.new_zeros((len(group_WN), num_groups + 1))
    return count_WG.scatter_add_(1, group_WN, torch.ones_like(group_WN))[:, :-1]
