"""The settings of the profiler: the section `profiler`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config.rules import MIB, PATH
from engine.config.validation import rule

_EVERY = rule(
    "at least 1, or auto; at most 65536", lambda value: value == "auto" or 1 <= value <= 65536
)


def _is_address(value: str) -> bool:
    return value != "" and value.isprintable() and not set(value) & set(" /")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfilerConfig:
    """What the profiler measures, and where it writes it."""

    enabled: bool = True  # time every phase of every layer on every rank
    every: int | Literal["auto"] = field(default="auto", metadata=_EVERY)  # time every phase
    # in one of so many steps, and in all others only layers and what waits for ranks; auto: 16 on
    # CUDA, 1 on the CPU and with spans, deepspeed_comms or moe.capacity.speed_aware
    spans: str | None = field(default=None, metadata=PATH)  # a folder: every rank writes the spans
    # of every step in which all phases are timed there
    spans_mib: float = field(default=64.0, metadata=MIB)  # most of one rank's span files; the
    # newest steps are kept
    routing: str | None = field(default=None, metadata=PATH)  # a folder: the rows of every expert
    # in every layer and step are recorded there, also where profiler.enabled is false
    routing_mib: float = field(default=64.0, metadata=MIB)  # most of one rank's recording; when it
    # is full, every second step of it is removed, so that the whole job stays covered
    routing_claims: bool = False  # also record which experts each token chose, with their scores,
    # in every 8th step
    metrics_port: int | None = field(  # rank 0 serves Prometheus' /metrics at it; null: off
        default=None, metadata=rule("a port, 0 to 65535; 0: any free one", lambda v: 0 <= v < 65536)
    )
    metrics_host: str = field(  # the address that serves metrics_port
        default="127.0.0.1", metadata=rule("an address or a host name", _is_address)
    )
    deepspeed_comms: bool = False  # add the table of DeepSpeed's comms logger to the report
