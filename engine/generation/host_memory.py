"""Host memory that this process may still take: the host's, within the limits of its cgroups.

A container, a Slurm step and a systemd unit limit memory with cgroups. /proc/meminfo does not know
of them, and the kernel kills a process that exceeds one. Every limit between the process's own
cgroup and the root counts, as each covers all processes below it:

    a pod of 16 GiB in which 10 are used, a container in it of 8 GiB in which 3 are used:
    min(16 - 10, 8 - 3) = 5 GiB

Version 1 has a tree of its own for memory, version 2 one tree for all; a host may mount both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Memory that is left, and what limits it."""

    num_bytes: int
    limit: str = ""  # file of the cgroup's limit, "" for the host's memory


@dataclass(frozen=True, slots=True)
class _Version:
    """Names of the files and of the lines of memory.stat in one version of cgroups."""

    limits: tuple[str, ...]
    usage: str
    stat_limit: str  # the lowest limit of all ancestors, also of those that are not visible
    page_cache: tuple[str, ...]


_V1 = _Version(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "hierarchical_memory_limit",
    ("total_inactive_file", "total_active_file"),
)
# Above memory.high processes are not killed but slowed down until they stand still.
_V2 = _Version(
    ("memory.max", "memory.high"), "memory.current", "", ("inactive_file", "active_file")
)


def free_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> FreeMemory:
    """Return the smallest of the host's available memory and what each cgroup leaves.

    Args:
        proc: where the file system of processes is mounted.
        cgroups: where cgroups are mounted if `proc` does not tell.
    """
    found = [FreeMemory(_available(proc))]
    for mount, inner, version in _memory_cgroups(proc, cgroups):
        # The process's own cgroup, then its ancestors up to the root that is visible here.
        for path in (inner, *inner.parents):
            found += _left(mount / path, version)
    return min(found, key=lambda each: each.num_bytes)


def _available(proc: Path) -> int:
    """Return the host's memory that can be had without swapping."""
    try:
        text = (proc / "meminfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        text = ""
    if match := re.search(r"^MemAvailable:\s+(\d+)", text, re.MULTILINE):
        return int(match[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _memory_cgroups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, PurePosixPath, _Version]]:
    """Yield mount point, this process's path below it and version of each tree with its memory."""
    mounts = list(_mounts(proc))
    for line in _lines(proc / "self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            version, default = _V1, cgroups / "memory"
        elif number == "0" and not controllers:
            version, default = _V2, cgroups
        else:
            continue
        own = [(root, point) for root, point, each in mounts if each is version]
        for root, point in own or [("/", default)]:
            yield point, _below(path, root), version


def _mounts(proc: Path) -> Iterator[tuple[str, Path, _Version]]:
    """Yield root, mount point and version of the mounted trees that may control memory."""
    for line in _lines(proc / "self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        root, point = _unescape(fields[3]), Path(_unescape(fields[4]))
        if kind[0] == "cgroup2":
            yield root, point, _V2
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            yield root, point, _V1


def _below(path: str, root: str) -> PurePosixPath:
    """Return a cgroup's path below the cgroup that is mounted.

    A container sees its own cgroup mounted and, without a namespace for cgroups, the host's path of
    it: what is not below the mounted one is taken as the mounted one.
    """
    own, mounted = PurePosixPath(path), PurePosixPath(root)
    if ".." in own.parts or not own.is_relative_to(mounted):
        return PurePosixPath()
    return own.relative_to(mounted)


def _left(folder: Path, version: _Version) -> Iterator[FreeMemory]:
    """Yield what a cgroup leaves; nothing where it has no limit or is not visible."""
    usage = _number(folder / version.usage)
    if usage is None:
        return
    stat = {
        key: int(value)
        for key, _, value in (line.partition(" ") for line in _lines(folder / "memory.stat"))
        if value.isdigit()
    }
    # The kernel drops page cache, such as what was read of a checkpoint, before it kills.
    used = max(0, usage - sum(stat.get(key, 0) for key in version.page_cache))
    for name in version.limits:
        limit = _number(folder / name)
        if limit is not None:
            yield FreeMemory(max(0, limit - used), str(folder / name))
    if version.stat_limit in stat:
        left = max(0, stat[version.stat_limit] - used)
        yield FreeMemory(left, f"{folder}/memory.stat ({version.stat_limit})")


def _number(path: Path) -> int | None:
    """Return the number in a file; None without a file, and for `max`: no limit."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    """Return a file's lines, none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
