"""Where the job runs: a small file system that can be filled, a network that can be slowed.

Both need root: a tmpfs, and a network namespace whose loopback tc shapes. Without root disk_full
limits the size of the ranks' files instead (RLIMIT_FSIZE), and there is no slow_link.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

_SIZE_MIB = 16
_BALLAST = "ballast"


def is_root() -> bool:
    """Return whether file systems and namespaces can be made."""
    return os.geteuid() == 0


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a small file system at `folder`; unmount it on leaving."""
    folder.mkdir()
    options = f"size={_SIZE_MIB}m"
    _call("mount", "-t", "tmpfs", "-o", options, "lockstep-soak", str(folder))
    try:
        yield
    finally:
        _call("umount", "--lazy", str(folder))


def fill(folder: Path) -> None:
    """Fill the file system."""
    ballast = os.open(folder / _BALLAST, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    os.write(ballast, bytes(size))
    finally:
        os.close(ballast)


def free(folder: Path) -> None:
    """Free the space again."""
    (folder / _BALLAST).unlink(missing_ok=True)


class Network:
    """A network namespace with nothing but a loopback."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.command = ["ip", "netns", "exec", name]

    def slow(self, rate: str) -> None:
        """Limit the rate from now on."""
        shape = ("tbf", "rate", rate, "burst", "16kb", "latency", "400ms")
        _call(*self.command, "tc", "qdisc", "replace", "dev", "lo", "root", *shape)

    def restore(self) -> None:
        """Lift the limit."""
        command = [*self.command, "tc", "qdisc", "del", "dev", "lo", "root"]
        subprocess.run(command, capture_output=True, check=False)  # there may be none


@contextlib.contextmanager
def network() -> Iterator[Network | None]:
    """Yield a network for the ranks alone; None where it cannot be made."""
    if why_no_network():
        yield None
        return
    made = Network(f"lockstep-soak-{os.getpid()}")
    _call("ip", "netns", "add", made.name)
    try:
        # Ethernet's MTU: a loopback's packets are larger than the filter accepts.
        _call("ip", "-n", made.name, "link", "set", "lo", "mtu", "1500", "up")
        yield made
    finally:
        subprocess.run(["ip", "netns", "del", made.name], capture_output=True, check=False)


def why_no_network() -> str:
    """Return what is missing to make a network; "" for nothing."""
    if not is_root():
        return "making a network namespace needs root"
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        return f"{' and '.join(missing)} not found; install iproute2"
    return ""


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
