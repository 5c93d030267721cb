"""Which fault comes next: a seeded choice, pure.

kill_rank    SIGKILL of one rank               kill_agent  SIGKILL of torchrun's agent
stop_rank    SIGSTOP of one rank, for good     pause_rank  SIGSTOP, SIGCONT a moment later
term_agent   SIGTERM of the agent, as a batch system does at the end of its time
disk_full    the output's file system has no byte left, until the run has ended
slow_link    the ranks' network has a small rate for some seconds
torn_tail    SIGKILL of the agent; the end of a part is then cut off, as by a loss of power
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
# The run goes on as if nothing had happened, or at least may.
SURVIVABLE = ("pause_rank", "slow_link")
# torchrun itself ends, so that it cannot start the ranks again.
ENDS_AGENT = ("kill_agent", "term_agent", "torn_tail")
RATES = ("20mbit", "2mbit", "200kbit", "20kbit")
_EARLY = 0.25  # of the faults come while the ranks start
_START_S = 4.0
_WORK_S = 2.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. early: counted from the start of the ranks, else from the first record they write.

    after_s: seconds from there. victim: a rank, as a fraction of their number. held_s: how long a
    pause or a slow link lasts. rate: of the link, as tc writes it. torn: bytes cut off.
    """

    kind: str
    early: bool
    after_s: float
    victim: float
    held_s: float
    rate: str
    torn: int

    def rank(self, num_ranks: int) -> int:
        """The victim among so many ranks."""
        return int(self.victim * num_ranks)


def faults(seed: int, kinds: Collection[str] = KINDS) -> Iterator[Fault]:
    """An endless sequence, the same for a seed: each kind once in every `len(kinds)` faults."""
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
