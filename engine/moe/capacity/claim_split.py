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
from engine.ops.deal import deal_claims, list_claims, list_start, parts_of_list
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
    load_W: np.ndarray  # int64, rows of each rank that were subject to capacity
    counts_WI: torch.Tensor  # int64, rows of each source rank for each instance
    before_WE: np.ndarray  # int64, top-k assignments before capacity
    non_finite_W: np.ndarray  # int64


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
    code_WB, num_experts = gathered.code_WB, gathered.claims.num_experts
    num_ranks, instances = len(code_WB), split.instances
    order_M = order_claims(gathered.keys)
    listed = list_claims(code_WB, order_M, gathered.non_finite_W1, num_experts)
    place_M1 = parts_of_list(listed, num_ranks, num_experts)[1]
    _, slot_M1, _ = sort_by_expert(place_M1, num_experts)
    by_rank = limits is not None and limits.rank_W is not None
    if not by_rank:
        listed = listed[: list_start(num_ranks, num_experts)]
    # SYNC: the cut and the split are made on the host; with the limits of ranks from all claims in
    # order, otherwise from the loads alone.
    counts_WC, place_host_M1 = parts_of_list(listed.cpu(), num_ranks, num_experts)
    counts_W2E = counts_WC[:, :-1].view(num_ranks, 2, num_experts).numpy()
    claims_E, exempt_E = counts_W2E.sum(0)
    limit_W = None
    if limits is not None and limits.rank_W is not None:
        limit_W, place_M = limits.rank_W, place_host_M1.numpy()[:, 0]
        kept_E = cut(place_M[place_M >= 0], split.hosts, limit_W)
    elif limits is not None and limits.capacity is not None:
        kept_E = np.minimum(claims_E, limits.capacity)
    else:
        kept_E = claims_E
    base_W = np.zeros(num_ranks, np.int64)
    np.add.at(base_W, instances.rank_I[instances.home_instance_E], exempt_E)
    rows_I = split.rows(kept_E, base_W=base_W, limit_W=limit_W, speeds_W=_array(speeds_W))
    # The slots of an expert's claims begin after those of all experts before it.
    first_E = claims_E.cumsum() - claims_E
    ends_EH = to_device(torch.from_numpy(split.ends(rows_I) + first_E[:, None]), code_WB.device)
    hosts_EH1 = instances.host_table(code_WB.device)
    instance_WB, counts_WI = deal_claims(
        code_WB, order_M, slot_M1, ends_EH, hosts_EH1, instances.num_instances
    )
    load_W = np.zeros(num_ranks, np.int64)
    np.add.at(load_W, instances.rank_I, rows_I)
    return SplitClaims(
        instance_WB=instance_WB,
        load_W=load_W,
        counts_WI=counts_WI,
        before_WE=counts_W2E.sum(1),
        non_finite_W=counts_WC[:, -1].numpy(),
    )


def _array(speeds_W: tuple[int, ...] | None) -> np.ndarray | None:
    return None if speeds_W is None else np.array(speeds_W, dtype=np.int64)
