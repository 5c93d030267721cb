"""Row split: how many rows each instance of a layer computes, and which rows those are.

Every rank knows the rows of every expert and computes the same split (`engine.ops.split`): the most
loaded rank has as few rows as the hosts allow, and as many rows as possible stay at their homes.
Low-bit copies take only the rows that have to move.

Which rows: an expert's rows have an order, the same on every rank, and its hosts take them in turn,
the home first, then the copies by rank. By counts alone the order is (source rank, position); under
a capacity policy, or with low-bit copies, it is that of the claims, best first.

Worked example, 2 ranks, experts 0 and 1 at home on ranks 0 and 1, a copy of expert 0 on rank 1. 7
and 1 rows: 4 of expert 0 stay at home and 3 move, so each rank computes 4. Rank 0 has the first 5
rows of expert 0 and rank 1 the last 2: rank 0 sends its fifth row to the copy, rank 1 both.

Legend: E experts in home order, I instances, H most hosts of an expert, W expert-parallel ranks, T
tokens on this rank, K top-k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from engine.moe.placement.instances import Instances
from engine.ops.deal import deal_rows
from engine.ops.expert_hosts import Hosts
from engine.ops.split import split_rows
from engine.ops.to_device import to_device


@dataclass(frozen=True, slots=True)
class SplitRule:
    """When rows move to copies."""

    low_bit: bool = False  # copies are less precise than homes
    target: float = 0.95  # of low-bit copies: share of perfect balance up to which rows move
    min_rows: int = 0  # fewest rows of a copy
    speeds_W: tuple[int, ...] | None = None  # of the ranks, where a call names none; None: equal


class RowSplit:
    """Splits the rows of one layer's experts over their instances.

    Args:
        instances: of the layer.
        rule: the same on every rank.
    """

    def __init__(self, instances: Instances, rule: SplitRule) -> None:
        self.instances, self.rule = instances, rule
        place_I = instances.home_order_E[instances.expert_I]
        self.hosts = Hosts(
            num_ranks=instances.num_ranks,
            expert_I=place_I,
            rank_I=instances.rank_I,
            home_I=instances.is_home_I,
        )

    def rows(
        self,
        load_E: np.ndarray,
        *,
        base_W: np.ndarray | None = None,
        limit_W: np.ndarray | None = None,
        speeds_W: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the rows of each instance, int64 [I].

        Args:
            load_E: int64, rows of each expert that may move.
            base_W: int64, rows of each rank that stay; None: none.
            limit_W: int64, most rows of each rank without those; the caller knows of a split within
                them. None: no limit.
            speeds_W: int64, relative speed of each rank; None: those of the rule.
        """
        rule = self.rule
        if speeds_W is None and rule.speeds_W is not None:
            speeds_W = np.array(rule.speeds_W, dtype=np.int64)
        if not rule.low_bit:
            return split_rows(
                load_E, self.hosts, speeds_W=speeds_W, limit_W=limit_W, least_block=rule.min_rows
            )
        if limit_W is None:
            limit_W = self._target_limits(load_E, base_W, speeds_W)
        return split_rows(
            load_E,
            self.hosts,
            speeds_W=speeds_W,
            limit_W=limit_W,
            fewest_moved=True,
            least_block=rule.min_rows,
        )

    def _target_limits(
        self, load_E: np.ndarray, base_W: np.ndarray | None, speeds_W: np.ndarray | None
    ) -> np.ndarray:
        """Return the rows up to which low-bit copies relieve each rank: ceil(mean / target)."""
        num_ranks = self.instances.num_ranks
        base_W = np.zeros(num_ranks, np.int64) if base_W is None else base_W
        total = int(load_E.sum() + base_W.sum())
        share = Fraction(total) / Fraction(str(self.rule.target))
        speeds = [1] * num_ranks if speeds_W is None else speeds_W.tolist()
        limits = [math.ceil(share * speed / sum(speeds)) for speed in speeds]
        return np.maximum(np.array(limits, dtype=np.int64) - base_W, 0)

    def deal(self, loads_WE: np.ndarray, rows_I: np.ndarray) -> np.ndarray:
        """Return the rows of each source rank for each instance, int64 [W, I], by counts alone.

        Args:
            loads_WE: int64, rows of each source rank for each expert.
            rows_I: int64, the split of their sum.
        """
        ends_EH = self.ends(rows_I)
        upto_WE = loads_WE.cumsum(0)
        low_WE1, high_WE1 = (upto_WE - loads_WE)[:, :, None], upto_WE[:, :, None]
        starts_EH = np.concatenate((np.zeros_like(ends_EH[:, :1]), ends_EH[:, :-1]), axis=1)
        part_WEH = ends_EH.clip(low_WE1, high_WE1) - starts_EH.clip(low_WE1, high_WE1)
        counts_WI = np.zeros((len(loads_WE), len(rows_I)), dtype=np.int64)
        hosts_EH = self.instances.hosts_EH
        counts_WI[:, hosts_EH[hosts_EH >= 0]] = part_WEH[:, hosts_EH >= 0]
        return counts_WI

    def ends(self, rows_I: np.ndarray) -> np.ndarray:
        """Return where each host's rows end in its expert's order, int64 [E, H]."""
        hosts_EH = self.instances.hosts_EH
        rows_EH = np.where(hosts_EH >= 0, rows_I[hosts_EH], 0)
        return rows_EH.cumsum(1)

    def instances_of(
        self,
        homes_TK: torch.Tensor,
        slot_TK: torch.Tensor,
        offset_E: np.ndarray,
        rows_I: np.ndarray,
    ) -> torch.Tensor:
        """Return the instance of each of this rank's assignments, int64 [T, K], by counts alone.

        Args:
            homes_TK: int64, the instances of the experts' homes.
            slot_TK: int64, the slot of each assignment among this rank's.
            offset_E: int64, by home order: what a slot of the expert is ahead of the row's place in
                the expert's order, over all ranks.
            rows_I: int64, the split.
        """
        instances, device = self.instances, homes_TK.device
        ends_EH = self.ends(rows_I)
        ends_IH = np.zeros((instances.num_instances, ends_EH.shape[1]), dtype=np.int64)
        ends_IH[instances.home_instance_E] = ends_EH + offset_E[:, None]
        ends = to_device(torch.from_numpy(ends_IH), device)
        return deal_rows(homes_TK, slot_TK, ends, instances.host_table_of_homes(device))
