"""Claim split: which claims are kept where experts have copies, and which instance computes each.

The part of `agreement.py` for layers with copies under a capacity policy, or with low-bit copies.
All ranks' claims are gathered with all their keys, and every rank decides alike:

    order    the claims, best first                                        engine.ops.order_claims
    cut      scope rank: go through them and keep each that some split     engine.ops.split
             can still place with no rank over its limit; scope expert:
             each expert's best, up to its capacity
    split    rows of every instance                                        row_split.py
    deal     an expert's best claims go to its home, the next to its
             copies by rank

The kept set of scope rank is the greedy one of a transversal matroid: of all sets that can be
placed it has the largest total for any order key. Without copies it is each rank's best.

Worked example, 2 ranks with a limit of 2, experts 0 and 1 at home on ranks 0 and 1, a copy of 0 on
rank 1. Claims, best first: e0 e0 e0 e1 e0 e1. The first three fit (two at home, one on the copy),
e1 too; then all four slots are taken, and the rest is dropped.

Legend: T tokens on this rank, K top-k, N claims of this rank, B claims of a rank after padding, M =
W * B, E experts in home order, I instances, H most hosts of an expert, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.moe.capacity.consensus_global import GatheredClaims
from engine.moe.placement.row_split import RowSplit
from engine.ops.order_claims import order_claims
from engine.ops.sort_by_expert import sort_by_expert
from engine.ops.split import cut
from engine.ops.to_device import to_device


@dataclass(frozen=True, slots=True)
class Limits:
    """What a capacity policy allows; one of the two."""

    capacity: int | None = None  # claims of each expert, of all its instances together
    rank_W: np.ndarray | None = None  # int64, claims of each rank


@dataclass(frozen=True, slots=True)
class SplitClaims:
    """The claims of all ranks after the split."""

    instance_WB: torch.Tensor  # int64, what computes each claim, exempt ones at home; -1: dropped
    kept_WB: torch.Tensor  # bool, of the claims subject to capacity
    load_W: np.ndarray  # int64, rows of each rank that were subject to capacity
    counts_WI: torch.Tensor  # int64, rows of each source rank for each instance
    before_WE: torch.Tensor  # int64, top-k assignments before capacity
    non_finite_W1: torch.Tensor  # int64


def split_claims(
    gathered: GatheredClaims,
    split: RowSplit,
    limits: Limits | None,
    speeds_W: tuple[int, ...] | None = None,
) -> SplitClaims:
    """Decide on the claims of all ranks; the same on every rank.

    Args:
        gathered: with all keys, waited for.
        split: of the layer.
        limits: None: nothing is dropped.
        speeds_W: relative speed of each rank; None: all equal.
    """
    code_WB, claims = gathered.code_WB, gathered.claims
    num_experts, instances = claims.num_experts, split.instances
    num_ranks, size = code_WB.shape
    code_M = code_WB.flatten()
    competes_M = code_M < num_experts
    order_M = order_claims(gathered.keys)
    place_M = code_M.where(competes_M, -1)[order_M]  # best first
    _, slot_M1, load_E = sort_by_expert(place_M[:, None], num_experts)
    counts = _count(code_WB, num_experts)
    exempt_WE = counts[1]
    # SYNC: the cut and the split are made on the host; with the limits of ranks from all claims in
    # order, otherwise from the loads alone.
    by_rank = limits is not None and limits.rank_W is not None
    parts = [load_E, exempt_WE.sum(0), *([place_M] if by_rank else [])]
    host = torch.cat(parts).cpu().numpy()
    claims_E, exempt_E, place_host = np.split(host, [num_experts, 2 * num_experts])
    limit_W = None
    if limits is not None and limits.rank_W is not None:
        limit_W = limits.rank_W
        kept_E = cut(place_host[place_host >= 0], split.hosts, limit_W)
    elif limits is not None and limits.capacity is not None:
        kept_E = np.minimum(claims_E, limits.capacity)
    else:
        kept_E = claims_E
    base_W = np.zeros(num_ranks, np.int64)
    np.add.at(base_W, instances.rank_I[instances.home_instance_E], exempt_E)
    rows_I = split.rows(kept_E, base_W=base_W, limit_W=limit_W, speeds_W=_array(speeds_W))
    ends_EH = to_device(torch.from_numpy(split.ends(rows_I)), code_M.device)
    first_E = load_E.cumsum(0) - load_E
    safe_M = place_M.clamp(min=0)
    index_M = slot_M1[:, 0] - first_E[safe_M]
    found_M = split.hosts_of(safe_M, index_M, ends_EH).where(place_M >= 0, -1)
    instance_M = torch.empty_like(code_M).scatter_(0, order_M, found_M)
    kept_WB = (instance_M >= 0).view(num_ranks, size)
    exempt_M = (code_M >= num_experts) & (code_M < 2 * num_experts)
    home_M = instances.homes((code_M - num_experts).clamp(0, num_experts - 1))
    instance_WB = instance_M.where(~exempt_M, home_M).view(num_ranks, size)
    load_W = np.zeros(num_ranks, np.int64)
    np.add.at(load_W, instances.rank_I, rows_I)
    counts_WI = _count_instances(instance_WB, instances.num_instances)
    return SplitClaims(
        instance_WB, kept_WB, load_W, counts_WI, counts[0] + exempt_WE, gathered.non_finite_W1
    )


def _count(code_WB: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return each rank's claims subject to capacity and exempt ones, int64 [2, W, E]."""
    num_ranks = len(code_WB)
    counts = code_WB.new_zeros((num_ranks, 3 * num_experts + 1))
    counts.scatter_add_(1, code_WB, torch.ones_like(code_WB))
    return counts[:, : 2 * num_experts].view(num_ranks, 2, num_experts).transpose(0, 1)


def _count_instances(instance_WB: torch.Tensor, num_instances: int) -> torch.Tensor:
    counts = instance_WB.new_zeros((len(instance_WB), num_instances + 1))
    index_WB = instance_WB.where(instance_WB >= 0, num_instances)
    return counts.scatter_add_(1, index_WB, torch.ones_like(index_WB))[:, :-1]


def _array(speeds_W: tuple[int, ...] | None) -> np.ndarray | None:
    return None if speeds_W is None else np.array(speeds_W, dtype=np.int64)
