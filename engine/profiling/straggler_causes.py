"""Straggler causes: why the group waited, and for which rank. Pure; no communication.

Takes every rank's totals of a run. The wait that a rank caused (`collector.py`) is split by cause:

    device   the rank's own calls, priced at its peers' speed (`cost_model.py`), give its relative
             compute time at equal load; the excess of all its compute is due to the device
    load     of what is left at combines, as much as the rows of the most loaded rank, of homes and
             copies, exceed the mean rank's: the experts' load
    tokens   of what is left at other collectives, consensus, dispatch and tensor, the share by
             which its attention and gate had more to do than those of the others
    host     the rest: time between the layers (scheduling, sampling, reading, writing) and stalls;
             all of it where few steps hold most of the wait it caused; and, before any other cause,
             the time in which its process did not run (`stall_detector.py`)
    network  of no rank: transfer time beyond what a collective costs without bytes, less what the
             others waited in the middle of a collective for a process that did not run

A collective's cost without bytes is taken from the control messages, the smallest ones.

Legend: W ranks of the group, L layers + 1 (the first row is outside of the layers), P phases.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from engine.profiling.collector import PhaseTotals, WaitAttribution
from engine.profiling.cost_model import price
from engine.profiling.layer_causes import causes_by_layer
from engine.profiling.phase_clock import Phase

CAUSES = ("load", "tokens", "device", "host", "network")
_DENSE = (Phase.ATTENTION, Phase.GATE, Phase.PLAN, Phase.OTHER)
_EXCHANGE = (Phase.DISPATCH, Phase.COMBINE)
# From this relative compute time on a device is slow. The noise of a run of 1 s is added to it, and
# falls with the root of the time: neighbours of a virtual machine make equal ranks differ by 16%
# over 4 s.
_SLOW, _SLOW_NOISE = 1.1, 0.3
# Stalled steps hold at least this share of the wait that a rank caused, and are at most this share
# of the steps and this many per second.
_STALLED_SHARE, _MAX_STALLED_STEPS, _MAX_STALLS_PER_SECOND = 0.7, 0.1, 4.0


@dataclass(frozen=True, slots=True)
class RankProfile:
    """What one rank measured in a run."""

    rank: int
    host: str
    totals: PhaseTotals
    experts: np.ndarray  # cost curve of its experts' calls (`cost_model.py`)
    attention: np.ndarray  # cost curve of its attention's calls
    # layer -> this rank's experts, homes and then copies, and the rows of each after capacity
    loads_after: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)
    process_stalls: tuple[int, float] = (0, 0.0)  # number of them, seconds of all


@dataclass(frozen=True, slots=True)
class RankAttribution:
    """The wait that one rank caused."""

    rank: int
    host: str
    wait_caused: dict[str, float]  # cause -> seconds that a mean rank waited for this one
    straggler_share: float  # share of the steps in which it caused the longest wait
    relative_compute_time: float  # its seconds over its peers' for the same calls
    relative_load: float  # its experts' rows over the mean rank's
    # (steps, seconds per step) where few steps hold most of the wait it caused
    stalled_steps: tuple[int, float] | None
    # (stalls, seconds per stall) where its process stalls explain most of its host's part
    process_stalls: tuple[int, float] | None
    host_ms: float  # milliseconds per step between the layers


@dataclass(frozen=True, slots=True)
class Analysis:
    """Where a group's time went that was no work; seconds are those of a mean rank."""

    seconds: float  # length of the steps that were compared
    wait_caused: dict[str, float]  # cause -> seconds; network: of transfer
    ranks: list[RankAttribution]
    bytes_per_second: float  # of dispatch and combine while they transferred; 0 without bytes
    layers: list[float]  # seconds of waiting for stragglers in each decoder layer
    layer_causes: list[dict[str, float]] = field(default_factory=list)  # the same by cause

    def share(self, cause: str) -> float:
        """Return the share of the run's time that a cause took."""
        return self.wait_caused[cause] / self.seconds if self.seconds else 0.0


def analyse(
    profiles: list[RankProfile], attribution: WaitAttribution, imbalance_L: np.ndarray
) -> Analysis:
    """Split the group's waiting and transfer by cause.

    Args:
        profiles: every rank of the group, in order.
        attribution: the wait that each rank caused.
        imbalance_L: float64 [L], rows of the most loaded rank over the mean rank after capacity, of
            every step; 1 outside of MoE layers.
    """
    ranks = [
        _attribution(profiles, index, attribution, imbalance_L) for index in range(len(profiles))
    ]
    network, rate = _network(profiles)
    # Bytes are counted in all steps, also in those whose arrivals were not compared.
    whole = float(np.mean([item.totals.seconds.sum() for item in profiles]))
    network *= attribution.step_seconds / whole if whole else 0.0
    ranks, network = _move_hidden_stalls(profiles, ranks, attribution.seconds.sum((1, 2)), network)
    wait_caused = {cause: sum(each.wait_caused[cause] for each in ranks) for cause in CAUSES}
    wait_caused["network"] = network
    return Analysis(
        seconds=attribution.step_seconds,
        wait_caused=wait_caused,
        ranks=ranks,
        bytes_per_second=rate,
        layers=attribution.seconds.sum((0, 2))[1:].tolist(),
        layer_causes=causes_by_layer(
            [item.totals for item in profiles],
            [each.wait_caused for each in ranks],
            attribution,
            imbalance_L,
            network,
        ),
    )


def _relative_compute_time(profiles: list[RankProfile], index: int) -> float:
    """Return a rank's seconds over what its peers would have needed for the same calls."""
    own = profiles[index]
    peers = [profile for other, profile in enumerate(profiles) if other != index]
    spent = priced = 0.0
    for name in ("experts", "attention"):
        table = getattr(own, name)
        at_peers = price(table, [getattr(peer, name) for peer in peers])
        if np.isfinite(at_peers) and at_peers > 0:
            spent += float(table[2].sum())
            priced += at_peers
    return spent / priced if priced else 1.0


def _attribution(
    profiles: list[RankProfile], index: int, attribution: WaitAttribution, imbalance_L: np.ndarray
) -> RankAttribution:
    own, seconds_WLP = profiles[index], np.stack([item.totals.seconds for item in profiles])
    wait_LP = attribution.seconds[index]
    relative_time = _relative_compute_time(profiles, index)
    stalled_steps = _stalled_steps(attribution, index)
    waited, stall_wait = float(wait_LP.sum()), _process_stall_wait(profiles, index)
    caused: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
    if stalled_steps is not None:
        caused["host"] = waited
    else:
        # Process stalls first: what they explain is no sign of a slow device or a high load.
        stalled = min(waited, stall_wait)
        wait_LP = wait_LP * (1 - stalled / waited if waited else 1.0)
        slow_from = _SLOW + _SLOW_NOISE / max(1.0, attribution.step_seconds) ** 0.5
        slow = 1 - 1 / relative_time if relative_time >= slow_from else 0.0
        # The wait at combines: the experts' part.
        combine = float(wait_LP[:, Phase.COMBINE].sum())
        caused["device"] = min(combine, slow * float(own.totals.seconds[:, Phase.EXPERTS].sum()))
        mean_L = seconds_WLP[:, :, Phase.EXPERTS].mean(0)
        excess_rows = float((mean_L * (imbalance_L - 1)).sum())
        caused["load"] = min(combine - caused["device"], excess_rows)
        caused["host"] = combine - caused["device"] - caused["load"]
        # The wait at other collectives: attention, gate, plan, and what is between the layers.
        dense = float(wait_LP.sum()) - combine
        own_P = own.totals.seconds.sum(0)
        others_P = np.delete(seconds_WLP, index, 0).sum(1).mean(0) if len(profiles) > 1 else own_P
        excess = {phase: max(0.0, float(own_P[phase] - others_P[phase])) for phase in _DENSE}
        device = min(dense, slow * float(own_P[list(_DENSE)].sum()))
        rest = dense - device
        unequal = excess[Phase.ATTENTION] + excess[Phase.GATE]
        unequal = unequal / total if (total := sum(excess.values())) else 0.0
        caused["device"] += device
        caused["tokens"] = rest * unequal
        caused["host"] += rest * (1 - unequal) + stalled
    rows_W = [sum(sum(rows) for _, rows in item.loads_after.values()) for item in profiles]
    mean = sum(rows_W) / len(rows_W)
    steps = max(1, attribution.steps)
    return RankAttribution(
        rank=own.rank,
        host=own.host,
        wait_caused=caused,
        straggler_share=float(attribution.straggler_steps[index]) / steps,
        relative_compute_time=relative_time,
        relative_load=rows_W[index] / mean if mean else 1.0,
        stalled_steps=stalled_steps,
        process_stalls=None,
        host_ms=1e3 * float(own.totals.seconds[0, Phase.OTHER]) / steps,
    )


def _process_stall_wait(profiles: list[RankProfile], index: int) -> float:
    """Return the seconds that a mean rank waited at most for this one's process to run again."""
    return profiles[index].process_stalls[1] * (len(profiles) - 1) / len(profiles)


def _move_hidden_stalls(
    profiles: list[RankProfile], ranks: list[RankAttribution], waited_W: np.ndarray, network: float
) -> tuple[list[RankAttribution], float]:
    """Move process stalls in the middle of a collective from the network's seconds to the hosts'.

    No rank arrives late there, so they look like transfer. waited_W: the wait each rank caused.
    """
    hidden_W = np.array(
        [max(0.0, _process_stall_wait(profiles, i) - each) for i, each in enumerate(waited_W)]
    )
    hidden_W *= min(1.0, network / hidden_W.sum()) if hidden_W.any() else 0.0
    found = []
    for index, (each, hidden) in enumerate(zip(ranks, hidden_W.tolist(), strict=True)):
        host, (count, seconds) = each.wait_caused["host"] + hidden, profiles[index].process_stalls
        is_main = count > 0 and _process_stall_wait(profiles, index) >= host / 2
        stalls = (count, seconds / count) if is_main else None
        caused = {**each.wait_caused, "host": host}
        found.append(replace(each, wait_caused=caused, process_stalls=stalls))
    return found, network - float(hidden_W.sum())


def _stalled_steps(attribution: WaitAttribution, index: int) -> tuple[int, float] | None:
    """Return (steps, mean seconds) of the steps with the longest waits that a rank caused, where
    few of them hold most of what it caused; otherwise None.
    """
    seconds_B = attribution.bucket_seconds[index][::-1]  # longest waits first
    steps_B = attribution.bucket_steps[index][::-1]
    total = float(seconds_B.sum())
    if not total:
        return None
    upto = int(np.searchsorted(seconds_B.cumsum(), _STALLED_SHARE * total)) + 1
    steps, seconds = int(steps_B[:upto].sum()), float(seconds_B[:upto].sum())
    most = _MAX_STALLS_PER_SECOND * max(1.0, attribution.step_seconds)
    if not 0 < steps <= min(most, _MAX_STALLED_STEPS * attribution.steps):
        return None
    # The wait is a mean over all ranks, and the rank itself did not wait.
    num_ranks = len(attribution.bucket_seconds)
    return steps, seconds * num_ranks / max(1, num_ranks - 1) / steps


def _network(profiles: list[RankProfile]) -> tuple[float, float]:
    """Return the seconds of a mean rank's transfers, and its bytes per second in them."""
    seconds = num_bytes = 0.0
    for profile in profiles:
        totals = profile.totals
        transfer_P = (totals.seconds - totals.waiting).sum(0)
        calls_P, bytes_P = totals.calls.sum(0), totals.num_bytes.sum(0)
        empty = transfer_P[Phase.CONTROL] / max(1, calls_P[Phase.CONTROL])
        for phase in (*_EXCHANGE, Phase.CONSENSUS, Phase.TENSOR):
            if bytes_P[phase]:
                seconds += max(0.0, float(transfer_P[phase] - calls_P[phase] * empty))
        num_bytes += float(bytes_P[list(_EXCHANGE)].sum())
    mean = seconds / len(profiles)
    return mean, num_bytes / len(profiles) / mean if mean else 0.0
