"""Estimate: the times of a step that follow from its work and a device, and what bounds it.

    bound     every part at the slower of memory and products, one after the other
    device    bound, and every exchange between ranks behind it
    eager     the device's time, or the host's where launching takes longer: kernels, host waits
    graph     the device's time with the static exchange, and the start of one CUDA graph per step

The first is the limit of the device; the others are what the engine would reach if the assumptions
of `device.py` held.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpu_checks.launches import COLUMNS, TABLE_LAYERS, read_table

from gpu_roofline.device import Assumed, Device
from gpu_roofline.work import Load, Work

STATIC_COLLECTIVES = 2  # per layer
_DEFAULT_ROWS = {"decode": "qwen3_moe decode", "prefill": "mixtral prefill"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTime:
    """One part of a step."""

    name: str
    memory: float  # bytes
    flops: float
    seconds: float
    bound_by: str  # memory or products


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One kind of step."""

    phase: str
    parts: tuple[PartTime, ...]
    exchange: float  # seconds between ranks
    static_exchange: float | None  # the same by the static exchange; None: it does not serve it
    launches: dict[str, float]  # of COLUMNS, per step
    launches_from: str  # row of the table of counts
    host: float  # seconds of the host in an eager step

    @property
    def bound(self) -> float:
        """Seconds that the device needs at least."""
        return sum(part.seconds for part in self.parts)

    @property
    def device(self) -> float:
        """Seconds with the exchanges."""
        return self.bound + self.exchange

    @property
    def eager(self) -> float:
        """Seconds of an eager step."""
        return max(self.device, self.host)

    def graph(self, assumed: Assumed) -> float | None:
        """Return the seconds of a step that is one CUDA graph, None where there is none."""
        if self.static_exchange is None or self.phase != "decode":
            return None
        return self.bound + self.static_exchange + assumed.graph_s

    @property
    def bound_by(self) -> str:
        """What takes most of an eager step: memory, products, links or the host's launches."""
        if self.host > self.device:
            return "launches"
        times = {"links": self.exchange}
        for part in self.parts:
            times[part.bound_by] = times.get(part.bound_by, 0.0) + part.seconds
        return max(times, key=lambda each: times[each])


def estimate(
    phase: str,
    work: Work,
    load: Load,
    device: Device,
    assumed: Assumed,
    family: str,
    ranks_per_host: int,
) -> Estimate:
    """Return the times of a step.

    Args:
        phase: decode or prefill.
        work: of the most loaded rank.
        load: that the work is of.
        device: of every rank.
        assumed: what is reached of it.
        family: whose launches were counted, where the table of counts has it.
        ranks_per_host: GPUs that a host's links connect.
    """
    memory = device.memory_bytes * assumed.memory_share
    products = device.flops * assumed.product_share
    parts = []
    for name, part in work.parts.items():
        read, computed = part.memory / memory, part.flops / products
        parts.append(
            PartTime(
                name=name,
                memory=part.memory,
                flops=part.flops,
                seconds=max(read, computed),
                bound_by="memory" if read >= computed else "products",
            )
        )
    row, per_layer, per_step = _launches(phase, family, load)
    # Counted with experts in every layer; a dense layer launches less.
    launches = {
        column: per_step[column] + (work.num_layers - TABLE_LAYERS) * per_layer[column]
        for column in COLUMNS
    }
    launches["collectives"] = per_layer["collectives"] * work.num_moe_layers
    if load.ranks == 1:
        launches["collectives"] = 0.0
    host = (
        launches["kernels"] * assumed.launch_s
        + launches["syncs"] * assumed.sync_s
        + launches["collectives"] * assumed.collective_s
        + assumed.host_s
    )
    exchange = _exchange(work.sent, work, load, device, assumed, ranks_per_host)
    exchange += launches["collectives"] * assumed.collective_s
    static = None
    if work.static_sent is not None:
        static = _exchange(work.static_sent, work, load, device, assumed, ranks_per_host)
        static += STATIC_COLLECTIVES * work.num_moe_layers * assumed.collective_s * (load.ranks > 1)
    return Estimate(
        phase=phase,
        parts=tuple(parts),
        exchange=exchange,
        static_exchange=static,
        launches=launches,
        launches_from=row,
        host=host,
    )


def _exchange(
    sent: float, work: Work, load: Load, device: Device, assumed: Assumed, ranks_per_host: int
) -> float:
    """Return the seconds of the bytes between ranks: within a host and beyond it side by side."""
    if load.ranks == 1:
        return 0.0
    near = (min(ranks_per_host, load.ranks) - 1) / (load.ranks - 1)
    link = device.link_bytes * assumed.link_share
    network = device.network_bytes * assumed.link_share
    rows = max(sent * near / link, sent * (1 - near) / network)
    return rows + work.reduced / link


def _launches(
    phase: str, family: str, load: Load
) -> tuple[str, dict[str, float], dict[str, float]]:
    """Return the row of the table of counts, and its numbers per layer and per step."""
    rows = read_table()[1]
    name = f"{family} {phase}"
    # The row of Mixtral's decode has one expert per rank, where nothing is sorted.
    if name not in rows:
        name = "olmoe decode" if family == "mixtral" else _DEFAULT_ROWS[phase]
        name = name if phase == "decode" else _DEFAULT_ROWS[phase]
    numbers, count = rows[name], len(COLUMNS)
    per_layer: dict[str, float] = dict(zip(COLUMNS, numbers[:count], strict=True))
    per_step: dict[str, float] = dict(zip(COLUMNS, numbers[count:], strict=True))
    return name, per_layer, per_step
