"""Straggler analysis: for what the group waited, and whose doing it was. Pure; no communication.

`summary.py` gathers every rank's totals at the end of a run and calls `analyse`. What the others
lost to a rank that came late (see `collector.py`) is split by cause:

    device   the rank's own calls priced at its peers' speed (`costs.py`) tell how much slower it
             is at equal load; that share of all its compute is the device's
    load     what is left of coming late to a combine, as far as the rows of the most loaded rank
             exceed the mean rank's: the experts' load
    tokens   what is left of coming late elsewhere, to a consensus, dispatch or tensor collective,
             as far as its attention and gate had more to do than the others'
    host     the rest: time between the layers (scheduling, sampling, reading, writing), and stalls;
             all of it where a rank loses most of its time in few steps; before all else the time
             in which its process did not run (`absence.py`)
    network  no rank's: transfer beyond what a collective costs without bytes, and beyond what the
             others waited in the middle of one for a process that did not run

A collective's cost without bytes is taken from the control words, the smallest there is.

Legend: W ranks of the group, L layers + 1 (the first row is outside of the layers), P phases.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from engine.profiling.collector import Charges, PhaseTotals
from engine.profiling.cost_model import price
from engine.profiling.layer_causes import causes_by_layer
from engine.profiling.phase_clock import Phase

CAUSES = ("load", "tokens", "device", "host", "network")
_DENSE = (Phase.ATTENTION, Phase.GATE, Phase.PLAN, Phase.OTHER)
_TRAVEL = (Phase.DISPATCH, Phase.COMBINE)
# A rank is a slow device from here on, and more in a short run: neighbours of a virtual machine
# make equal ranks differ by 16% over 4 s.
_SLOW, _SLOW_BY_CHANCE = 1.1, 0.3
# Stalls: most of a rank's charge in at most this share of the steps, and this many a second.
_MOST, _FEW, _RARE = 0.7, 0.1, 4.0


@dataclass(frozen=True, slots=True)
class RankProfile:
    """What one rank hands in. experts, attention: tables of its cost curves (`costs.py`).
    loads_after: layer -> first expert and rows of each of its experts, after capacity. absent: how
    often its process did not run, and seconds of it in all.
    """

    rank: int
    host: str
    totals: PhaseTotals
    experts: np.ndarray
    attention: np.ndarray
    loads_after: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    absent: tuple[int, float] = (0, 0.0)


@dataclass(frozen=True, slots=True)
class RankAttribution:
    """What a rank cost the others. lost: seconds by cause, the others' mean. late_share: share of
    the steps in which it cost the group most. slowness: its seconds over its peers' for the same
    calls. load: its experts' rows over the mean rank's. stalls: (steps, seconds each) where few
    steps hold most of its charge, otherwise None. absences: (times, seconds each) where its process
    did not run, as far as that explains most of what it cost on its host, otherwise None. host_ms:
    milliseconds a step between the layers.
    """

    rank: int
    host: str
    lost: dict[str, float]
    late_share: float
    slowness: float
    load: float
    stalls: tuple[int, float] | None
    absences: tuple[int, float] | None
    host_ms: float


@dataclass(frozen=True, slots=True)
class Analysis:
    """Where the group's time was lost. seconds: length of the steps that were compared. lost:
    seconds by cause, a mean rank's. bytes_per_second: of dispatch and combine while they
    transferred, a mean rank's; 0 where nothing travelled. layers: seconds lost to late ranks in
    each decoder layer. layer_causes: seconds lost in it by cause, a mean rank's.
    """

    seconds: float
    lost: dict[str, float]
    ranks: list[RankAttribution]
    bytes_per_second: float
    layers: list[float]
    layer_causes: list[dict[str, float]] = field(default_factory=list)

    def share(self, cause: str) -> float:
        """Share of the run that was lost to a cause."""
        return self.lost[cause] / self.seconds if self.seconds else 0.0


def analyse(profiles: list[RankProfile], charges: Charges, imbalance_L: np.ndarray) -> Analysis:
    """Split what the group lost by cause.

    profiles: every rank of the group, in order. imbalance_L: float64 [L], rows of the most loaded
    rank over the mean rank after capacity, of every step; 1 outside of MoE layers.
    """
    slowness = [_slowness(profiles, index) for index in range(len(profiles))]
    blames = [
        _blame(profiles, index, slowness[index], charges, imbalance_L)
        for index in range(len(profiles))
    ]
    network, rate = _network(profiles)
    # Bytes are counted in all steps, also in those whose arrivals nobody has compared.
    whole = float(np.mean([item.totals.seconds.sum() for item in profiles]))
    network *= charges.step_seconds / whole if whole else 0.0
    blames, network = _unhide(profiles, blames, charges, network)
    lost: dict[str, float] = {cause: sum(blame.lost[cause] for blame in blames) for cause in CAUSES}
    lost["network"] = network
    return Analysis(
        seconds=charges.step_seconds,
        lost=lost,
        ranks=blames,
        bytes_per_second=rate,
        layers=charges.seconds.sum((0, 2))[1:].tolist(),
        layer_causes=causes_by_layer(
            [item.totals for item in profiles], blames, charges, imbalance_L, lost["network"]
        ),
    )


def _slowness(profiles: list[RankProfile], index: int) -> float:
    """A rank's seconds over what its peers would have needed for the same calls."""
    own = profiles[index]
    peers = [profile for other, profile in enumerate(profiles) if other != index]
    spent = priced = 0.0
    for name in ("experts", "attention"):
        table = getattr(own, name)
        worth = price(table, [getattr(peer, name) for peer in peers])
        if np.isfinite(worth) and worth > 0:
            spent += float(table[2].sum())
            priced += worth
    return spent / priced if priced else 1.0


def _blame(
    profiles: list[RankProfile],
    index: int,
    slowness: float,
    charges: Charges,
    imbalance_L: np.ndarray,
) -> RankAttribution:
    own, seconds_WLP = profiles[index], np.stack([item.totals.seconds for item in profiles])
    charge_LP = charges.seconds[index]
    stalls = _stalls(charges, index)
    charged, cost = float(charge_LP.sum()), _absence_cost(profiles, index)
    lost: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    if stalls is not None:
        lost["host"] = charged
    else:
        away = min(charged, cost)
        charge_LP = charge_LP * (1 - away / charged if charged else 1.0)
        least = _SLOW + _SLOW_BY_CHANCE / max(1.0, charges.step_seconds) ** 0.5
        slow = 1 - 1 / slowness if slowness >= least else 0.0
        experts = float(charge_LP[:, Phase.COMBINE].sum())
        lost["device"] = min(experts, slow * float(own.totals.seconds[:, Phase.EXPERTS].sum()))
        mean_L = seconds_WLP[:, :, Phase.EXPERTS].mean(0)
        lost["load"] = min(experts - lost["device"], float((mean_L * (imbalance_L - 1)).sum()))
        lost["host"] = experts - lost["device"] - lost["load"]
        dense = float(charge_LP.sum()) - experts
        own_P = own.totals.seconds.sum(0)
        others_P = np.delete(seconds_WLP, index, 0).sum(1).mean(0) if len(profiles) > 1 else own_P
        excess = {phase: max(0.0, float(own_P[phase] - others_P[phase])) for phase in _DENSE}
        device = min(dense, slow * float(own_P[list(_DENSE)].sum()))
        left = dense - device
        unequal = excess[Phase.ATTENTION] + excess[Phase.GATE]
        unequal = unequal / total if (total := sum(excess.values())) else 0.0
        lost["device"] += device
        lost["tokens"] = left * unequal
        lost["host"] += left * (1 - unequal) + away
    rows_W = [sum(sum(rows) for _, rows in item.loads_after.values()) for item in profiles]
    mean = sum(rows_W) / len(rows_W)
    steps = max(1, charges.steps)
    return RankAttribution(
        rank=own.rank,
        host=own.host,
        lost=lost,
        late_share=float(charges.late_steps[index]) / steps,
        slowness=slowness,
        load=rows_W[index] / mean if mean else 1.0,
        stalls=stalls,
        absences=None,
        host_ms=1e3 * float(own.totals.seconds[0, Phase.OTHER]) / steps,
    )


def _absence_cost(profiles: list[RankProfile], index: int) -> float:
    """Seconds that a mean rank can have waited for this one's process to run again."""
    return profiles[index].absent[1] * (len(profiles) - 1) / len(profiles)


def _unhide(
    profiles: list[RankProfile], blames: list[RankAttribution], charges: Charges, network: float
) -> tuple[list[RankAttribution], float]:
    """Take out of the network's seconds what ranks were away in the middle of a collective, where
    nobody comes late.
    """
    charged_W = charges.seconds.sum((1, 2))
    hidden_W = np.array(
        [max(0.0, _absence_cost(profiles, i) - each) for i, each in enumerate(charged_W)]
    )
    hidden_W *= min(1.0, network / hidden_W.sum()) if hidden_W.any() else 0.0
    found = []
    for index, (blame, hidden) in enumerate(zip(blames, hidden_W.tolist(), strict=True)):
        host, (count, seconds) = blame.lost["host"] + hidden, profiles[index].absent
        mainly = count > 0 and _absence_cost(profiles, index) >= host / 2
        absences = (count, seconds / count) if mainly else None
        found.append(replace(blame, lost={**blame.lost, "host": host}, absences=absences))
    return found, network - float(hidden_W.sum())


def _stalls(charges: Charges, index: int) -> tuple[int, float] | None:
    """(steps, mean seconds) of a rank's stalls where they hold most of its charge."""
    lost_B, count_B = charges.lost[index][::-1], charges.count[index][::-1]
    total = float(lost_B.sum())
    if not total:
        return None
    upto = int(np.searchsorted(lost_B.cumsum(), _MOST * total)) + 1
    steps, seconds = int(count_B[:upto].sum()), float(lost_B[:upto].sum())
    few = steps <= _FEW * charges.steps and steps <= _RARE * max(1.0, charges.step_seconds)
    # The charge is a mean over all ranks, and the rank itself did not wait.
    others = seconds * len(charges.lost) / max(1, len(charges.lost) - 1)
    return (steps, others / steps) if few and steps else None


def _network(profiles: list[RankProfile]) -> tuple[float, float]:
    """Seconds that a mean rank's bytes took to travel, and bytes a second meanwhile."""
    seconds = num_bytes = 0.0
    for profile in profiles:
        totals = profile.totals
        transfer_P = (totals.seconds - totals.waiting).sum(0)
        calls_P, bytes_P = totals.calls.sum(0), totals.num_bytes.sum(0)
        empty = transfer_P[Phase.CONTROL] / max(1, calls_P[Phase.CONTROL])
        for phase in (*_TRAVEL, Phase.CONSENSUS, Phase.TENSOR):
            if bytes_P[phase]:
                seconds += max(0.0, float(transfer_P[phase] - calls_P[phase] * empty))
        num_bytes += float(bytes_P[list(_TRAVEL)].sum())
    mean = seconds / len(profiles)
    return mean, num_bytes / len(profiles) / mean if mean else 0.0
