"""Devices: what the makers publish, and what of it is assumed to be reached.

Nothing here was measured. Published figures: NVIDIA's data sheets of H100 SXM, H200 SXM and HGX
B200, dense operations, NVLink per direction. A network card of 400 Gbit/s per GPU is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU and its links."""

    name: str
    memory_gib: float  # that a driver leaves
    memory_bytes: float  # per second
    flops: float  # per second, 16-bit products
    link_bytes: float  # per second and direction, to GPUs of the same host
    network_bytes: float = 50e9  # per second and direction, to those of other hosts


DEVICES = {
    each.name: each
    for each in (
        Device(name="h100", memory_gib=79, memory_bytes=3.35e12, flops=989e12, link_bytes=450e9),
        Device(name="h200", memory_gib=139, memory_bytes=4.8e12, flops=989e12, link_bytes=450e9),
        Device(name="b200", memory_gib=178, memory_bytes=8.0e12, flops=2250e12, link_bytes=900e9),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """What is reached of a device, and what the host costs. All of it is assumed."""

    memory_share: float = 0.9  # of the published bandwidth
    product_share: float = 0.65  # of the published operations
    link_share: float = 0.8
    launch_s: float = 5e-6  # of the host, per kernel
    sync_s: float = 15e-6  # of a host wait: the device has nothing queued meanwhile
    collective_s: float = 25e-6  # of a collective, beyond its bytes
    host_s: float = 0.7e-3  # of a step: scheduling, sampling, the control message
    graph_s: float = 0.1e-3  # of the host to start a graph, with the scheduling hidden
