"""A link of limited rate between two processes of one machine: two network namespaces, joined by a
veth pair, each end shaped by tc's token bucket filter. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

_ADDRESSES = ("10.213.7.1", "10.213.7.2")


@dataclass(frozen=True, slots=True)
class End:
    """One end."""

    command: list[str]  # prefix of a command line that is to run there
    env: dict[str, str]  # for that command


@contextlib.contextmanager
def loopback() -> Iterator[tuple[End, End]]:
    """Yield two ends without a limit: this machine's loopback."""
    end = End([], {"MASTER_ADDR": "127.0.0.1"})
    yield end, end


@contextlib.contextmanager
def limited(rate: str) -> Iterator[tuple[End, End]]:
    """Yield two ends of a link of `rate`, as tc writes it (1gbit, 500mbit); taken down on leaving.

    Raises:
        ValueError: not root, ip or tc missing, or a rate that tc refuses.
    """
    if os.geteuid() != 0:
        raise ValueError("--link: making network namespaces needs root; run as root or without it")
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        raise ValueError(f"--link: {' and '.join(missing)} not found; install iproute2")
    names = [f"lockstep-{os.getpid()}-{side}" for side in "ab"]
    devices = [f"ls{os.getpid() % 100000}{side}" for side in "ab"]
    try:
        for name in names:
            _call("ip", "netns", "add", name)
        _call("ip", "link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        for name, device, address in zip(names, devices, _ADDRESSES, strict=True):
            _call("ip", "link", "set", device, "netns", name)
            _call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
            _call("ip", "-n", name, "link", "set", device, "up")
            _call("ip", "-n", name, "link", "set", "lo", "up")
            shape = ("tbf", "rate", rate, "burst", "256kb", "latency", "50ms")
            _call("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", device, "root", *shape)
        first, second = (
            End(
                ["ip", "netns", "exec", name],
                {"MASTER_ADDR": _ADDRESSES[0], "GLOO_SOCKET_IFNAME": device},
            )
            for name, device in zip(names, devices, strict=True)
        )
        yield first, second
    finally:
        for name in names:  # removes the veth pair as well
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _call(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(f"--link: `{' '.join(command)}` failed: {result.stderr.strip()}")
