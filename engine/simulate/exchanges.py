"""Exchanges: rows and bytes between ranks that follow from a layer's decisions.

What is sent once per token and rank (`moe.dispatch.deduplicate`) is estimated: rows times the share
that is unique where every choice of experts is equally likely. Whether a call is deduplicated is
decided by the engine's `LayoutPolicy`, bytes of the consensus by the formulas of its collectives.

Legend: I instances, W expert-parallel ranks, K top-k, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.config import MoEConfig
from engine.distributed.collectives import COLLECTIVE_BYTES
from engine.moe.capacity.consensus_global import gather_bytes, radix_bytes
from engine.moe.dispatch.dedup import expected_unique
from engine.moe.dispatch.layout_policy import LayoutPolicy
from engine.moe.dispatch.row_format import RowFormats
from engine.moe.router import Routing
from engine.ops.select_top import PASSES_A_WORD
from engine.simulate.decisions import Decided, LayerRules, StepCounts

_COUNT_BYTES = 8  # int64 of an exchanged count
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """One layer of one step."""

    load_W: np.ndarray  # int64, rows that each rank computes
    sent_W: np.ndarray  # int64, rows of each rank's tokens
    near_bytes: int  # of the busiest rank in one direction of the dispatch, within its node
    far_bytes: int  # to other nodes
    near_back_bytes: int  # of the combine
    far_back_bytes: int
    consensus_bytes: int  # that a rank sends


class LayerExchanges:
    """Bytes of one layer's calls.

    Args:
        rules: the layer's decisions.
        hidden: D of the rows.
        item: bytes of a number of a row.
        ranks_per_node: ranks that one node's links connect.
    """

    def __init__(self, rules: LayerRules, hidden: int, item: int, ranks_per_node: int) -> None:
        self._rules, self._row_bytes = rules, hidden * item
        instances, top_k = rules.instances, rules.router.top_k
        self._starts = np.array(instances.first_instances[:-1])
        config, dtype = MoEConfig(), _DTYPES[item]
        self._layout = LayoutPolicy(
            instances.first_instances, top_k, RowFormats.of(hidden, dtype, config.dispatch), config
        )
        sizes = np.diff(instances.first_instances).tolist()
        self._unique_W = np.array([_unique_share(size, sum(sizes), top_k) for size in sizes])
        rank_W = np.arange(instances.num_ranks)
        self._near_WW = rank_W[:, None] // ranks_per_node == rank_W // ranks_per_node
        np.fill_diagonal(self._near_WW, False)
        self._far_WW = rank_W[:, None] // ranks_per_node != rank_W // ranks_per_node

    def of(self, decided: Decided, counts: StepCounts) -> Exchanged:
        """Return what a layer exchanges."""
        # reduceat: every rank has at least one instance.
        rows_WW = np.add.reduceat(decided.counts_WI, self._starts, axis=1)
        layout = self._layout.choose(sum(counts.tokens_W))
        unique_bytes = layout.unique_row_bytes
        deduplicates = unique_bytes > 0
        sent_WW = rows_WW * float(self._row_bytes)
        if deduplicates:
            sent_WW = np.minimum(sent_WW, rows_WW * self._unique_W * unique_bytes)
        back_WW = rows_WW.T * float(self._row_bytes)
        return Exchanged(
            load_W=rows_WW.sum(0),
            sent_W=rows_WW.sum(1),
            near_bytes=_busiest(sent_WW, self._near_WW),
            far_bytes=_busiest(sent_WW, self._far_WW),
            near_back_bytes=_busiest(back_WW, self._near_WW),
            far_back_bytes=_busiest(back_WW, self._far_WW),
            consensus_bytes=self._consensus(counts, deduplicates),
        )

    def _consensus(self, counts: StepCounts, deduplicates: bool) -> int:
        """Return the bytes that a rank sends to agree."""
        rules, size = self._rules, self._rules.instances.num_ranks
        num_experts, config = rules.instances.num_experts, rules.capacity
        own = rules.instances.num_instances if rules.instances.has_copies else num_experts
        own += size if deduplicates else 0
        step = counts.as_step()
        by_counts = (size - 1) * own * _COUNT_BYTES
        if not rules.binds(step) and not rules.split.rule.low_bit:
            return by_counts
        if config.consensus == "quota":
            return (size - 1) * (3 * num_experts + 1) * 4
        if config.consensus == "local":
            return (size - 1) * (own + num_experts + 2) * _COUNT_BYTES
        none = torch.empty(0, rules.router.top_k, dtype=torch.int64)
        routing = Routing(torch.empty(0, num_experts), none, none.float())
        claims = rules.maker.make(routing, step)
        gather, radix = gather_bytes(claims, size), radix_bytes(claims, size)
        more = (claims.num_primary * PASSES_A_WORD + 1) * COLLECTIVE_BYTES
        by_gather = config.selection == "gather" or rules.instances.has_copies
        if by_gather or (config.selection == "auto" and gather <= radix + more):
            return gather
        return radix + by_counts + (size - 1) * num_experts * 4


def _unique_share(size: int, total: int, top_k: int) -> float:
    """Return a token's chance of a row for a rank of so many instances, over its rows for it."""
    rest = total - size
    touched = expected_unique([size, *[1] * rest], top_k) - rest * top_k / total
    return min(1.0, touched * total / (size * top_k))


def _busiest(bytes_WW: np.ndarray, among_WW: np.ndarray) -> int:
    """Return the bytes of the rank that sends or receives most."""
    chosen_WW = np.where(among_WW, bytes_WW, 0.0)
    return int(max(chosen_WW.sum(0).max(), chosen_WW.sum(1).max()))
