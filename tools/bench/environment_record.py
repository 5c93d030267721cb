"""Environment record: the hardware, commit and versions that a figure was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def environment_record(packages: Sequence[str] = ("torch", "transformers")) -> dict[str, Any]:
    """Return what every JSON line carries: commit, hardware, Python and package versions."""
    return {
        "commit": commit(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


def hardware() -> dict[str, Any]:
    """Return processor, usable cores, memory in GiB, vector units, and the GPU if there is one."""
    info = _read("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info)
    total = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo"))
    flags = set(info.split())
    return {
        "cpu": model[1].strip() if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(total[1]) / 2**20, 1) if total else None,
        "isa": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "gpu": _gpu(),
    }


def commit() -> str:
    """Return the commit, with '+changes' when tracked files differ; 'unknown' outside git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def version(package: str) -> str | None:
    """Return the version of an installed distribution, None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git on this machine
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
