"""Which consensus algorithms there are: from moe.capacity.consensus to a `Consensus`."""

from __future__ import annotations

from typing import Literal

from engine.distributed.collectives import Collectives
from engine.moe.capacity.consensus import Consensus
from engine.moe.capacity.consensus_global import GatherConsensus, RadixConsensus, SelectionByTraffic
from engine.moe.capacity.consensus_local import LocalConsensus
from engine.moe.capacity.consensus_quota import QuotaConsensus
from engine.moe.capacity.limits import Pools


def make_consensus(
    name: Literal["global", "quota", "local"],
    selection: Literal["auto", "gather", "radix"],
    pools: Pools,
    collectives: Collectives,
) -> Consensus:
    """Build the algorithm that moe.capacity.consensus names; selection: how `global` cuts."""
    if name == "local":
        return LocalConsensus()
    if name == "quota":
        return QuotaConsensus(pools, collectives)
    if selection == "gather":
        return GatherConsensus(collectives)
    if selection == "radix":
        return RadixConsensus(collectives)
    return SelectionByTraffic(collectives)
