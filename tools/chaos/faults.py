"""Faults and their seeded sequence. Pure.

kill_rank    SIGKILL of one rank               kill_agent  SIGKILL of torchrun's agent
stop_rank    SIGSTOP of one rank, for good     pause_rank  SIGSTOP, SIGCONT a moment later
term_agent   SIGTERM of the agent, as a batch system does at the end of its time
disk_full    the output's file system is full until the run has ended
slow_link    the ranks' network has a small rate for some seconds
torn_tail    SIGKILL of the agent; the end of a ledger shard is then cut off, as by a loss of power
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

KINDS = (
    "kill_rank",
    "kill_agent",
    "stop_rank",
    "pause_rank",
    "term_agent",
    "disk_full",
    "slow_link",
    "torn_tail",
)
# The run may continue.
SURVIVABLE = ("pause_rank", "slow_link")
# torchrun itself ends, so that it cannot start the ranks again.
ENDS_AGENT = ("kill_agent", "term_agent", "torn_tail")
RATES = ("20mbit", "2mbit", "200kbit", "20kbit")
_EARLY = 0.25  # share of the faults while the ranks start
_START_S = 4.0
_WORK_S = 2.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault."""

    kind: str
    early: bool  # counted from the start of the ranks, else from their first record
    after_s: float  # seconds from there
    victim: float  # a rank, as a fraction of their number
    held_s: float  # duration of a pause or a slow link
    rate: str  # of the link, as tc writes it
    torn: int  # bytes cut off

    def rank(self, num_ranks: int) -> int:
        """Return the victim among `num_ranks` ranks."""
        return int(self.victim * num_ranks)


def faults(seed: int, kinds: Collection[str] = KINDS) -> Iterator[Fault]:
    """Yield an endless sequence fixed by the seed: each kind once per `len(kinds)` faults."""
    rng = random.Random(seed)
    while True:
        deck = [kind for kind in KINDS if kind in kinds]
        rng.shuffle(deck)
        for kind in deck:
            early = rng.random() < _EARLY and kind != "torn_tail"  # there must be a tail
            yield Fault(
                kind=kind,
                early=early,
                after_s=rng.uniform(0.0, _START_S if early else _WORK_S),
                victim=rng.random(),
                held_s=rng.uniform(0.2, 1.0) if kind == "pause_rank" else rng.uniform(1, 4),
                rate=rng.choice(RATES),
                torn=rng.randint(1, 80),
            )
